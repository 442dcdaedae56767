"""What users and files give, checked where it enters: one clear error, or a value."""
