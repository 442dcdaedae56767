"""What the strategies share: a score matrix cut into tiles, and their results merged."""
