"""Bytes, times, counts and sets of numbers as people write and read them."""
