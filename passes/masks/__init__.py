"""Masks: an S x S mask becomes a tile function of global indices and per-token vectors."""

from ringfx.passes.masks.recover import recover

__all__ = ["recover"]
