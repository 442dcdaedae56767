"""Time and memory of one attention under each strategy, from a profile."""
