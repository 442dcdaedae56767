"""Watching ringfx work: what it says, which stage it is in, and its programs after every pass."""
