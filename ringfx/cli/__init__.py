"""The command ``ringfx``."""
