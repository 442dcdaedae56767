"""Measurements, and the profiles that are fitted to them."""
