"""Measurements; each writes what it measured, with date, hardware and versions."""
