"""Attention over tokens that are split between ranks, and the way from whole to split and back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfx.comm.stats import reset as reset_stats
    from ringfx.comm.stats import timed
    from ringfx.ops.dilated import dilated_attention
    from ringfx.ops.direct import ring_attention
    from ringfx.ops.layouts import gather, shard
    from ringfx.ops.operator import attention

__all__ = [
    "attention", "dilated_attention", "gather", "reset_stats", "ring_attention", "shard", "timed",
]  # fmt: skip

_HOME = {
    "attention": ("ringfx.ops.operator", "attention"),
    "dilated_attention": ("ringfx.ops.dilated", "dilated_attention"),
    "gather": ("ringfx.ops.layouts", "gather"),
    "reset_stats": ("ringfx.comm.stats", "reset"),
    "ring_attention": ("ringfx.ops.direct", "ring_attention"),
    "shard": ("ringfx.ops.layouts", "shard"),
    "timed": ("ringfx.comm.stats", "timed"),
}
"""Loaded when first asked for: ``ringfx.ops.tiling`` is below strategies, these are above."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ringfx.ops' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value
