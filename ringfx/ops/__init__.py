"""Attention over tokens that are split between ranks, and the way from whole to split and back."""

from ringfx.ops.attention import attention
from ringfx.ops.direct import ring_attention
from ringfx.ops.layouts import gather, shard

__all__ = ["attention", "gather", "ring_attention", "shard"]
