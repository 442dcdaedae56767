"""Attention over tokens that are split between ranks, and the way from whole to split and back."""

from ringfx.ops.attention import attention

__all__ = ["attention"]
