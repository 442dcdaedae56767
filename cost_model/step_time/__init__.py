"""The time of what runs outside attention in a step, operator by operator."""
