"""Layers for models."""

from ringfx.nn.dilated_attention import DilatedAttention

__all__ = ["DilatedAttention"]
