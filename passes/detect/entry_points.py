"""Calls that are attention by name, one row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call

__all__ = ["ENTRY_POINTS", "Candidate", "Near"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """An attention as the user spelled it: [..., tokens, head dim] operands and a mask."""

    node: Node
    found_by: str
    q: Node
    k: Node
    v: Node
    scale: float
    mask: Node | None = None
    """Boolean (true: attend) or additive, broadcastable to [..., q tokens, k tokens]."""
    is_causal: bool = False
    """Additionally key index <= query index (aligned top-left)."""
    dropout: float = 0.0


@dataclass(frozen=True)
class Near:
    """A near miss and why."""

    reason: str


def scaled_dot_product(node: Node) -> Candidate | Near:
    call = Call(node)
    q, k = call.shape("query"), call.shape("key")
    if not 3 <= len(q) <= 4:
        return Near(f"queries of {len(q)} dimensions; ringfx carries [B, S, D] and [B, H, S, D]")
    if len(q) == 4 and q[1] != k[1] and (k[1] == 0 or q[1] % k[1]):
        return Near(f"{q[1]} query heads are no multiple of {k[1]} key heads")
    scale: Any = call["scale"]
    return Candidate(
        node=node,
        found_by="sdpa",
        q=call["query"],
        k=call["key"],
        v=call["value"],
        scale=float(scale) if scale is not None else 1 / math.sqrt(q[-1]),
        mask=call["attn_mask"],
        is_causal=bool(call["is_causal"]),
        dropout=float(call["dropout_p"]),
    )


ENTRY_POINTS: Mapping[object, Callable[[Node], Candidate | Near]] = {
    aten.scaled_dot_product_attention.default: scaled_dot_product,
}
