"""Attention of one tile on one device, forward and backward."""
