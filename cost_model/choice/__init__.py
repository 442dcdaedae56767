"""Which strategy each layer takes, given what each costs and what fits."""
