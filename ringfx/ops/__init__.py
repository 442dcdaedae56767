"""Attention over tokens that are split between ranks, and the way from whole to split and back."""

from ringfx.comm.stats import reset as reset_stats
from ringfx.comm.stats import timed
from ringfx.ops.attention import attention
from ringfx.ops.dilated_attention import dilated_attention
from ringfx.ops.direct import ring_attention
from ringfx.ops.layouts import gather, shard

__all__ = [
    "attention",
    "dilated_attention",
    "gather",
    "reset_stats",
    "ring_attention",
    "shard",
    "timed",
]
