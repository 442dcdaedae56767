"""Calls that are attention by name, one row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.capture.origin import spelled_as
from ringfx.passes.detect.kernel_calls import KERNEL_CALLS, folded, is_plain
from ringfx.passes.detect.respell import KernelCall

__all__ = ["ENTRY_POINTS", "Candidate", "Near", "other_form"]

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
    if not is_plain(q, k, call.shape("value")):
        return Near(f"its operands {tuple(q)}, {tuple(k)} have heads that do not divide")
    scale: Any = call["scale"]
    return Candidate(
        node=node,
        found_by=_found_by(node),
        q=call["query"],
        k=call["key"],
        v=call["value"],
        scale=float(scale) if scale is not None else 1 / math.sqrt(q[-1]),
        mask=call["attn_mask"],
        is_causal=bool(call["is_causal"]),
        dropout=float(call["dropout_p"]),
    )


def _found_by(node: Node) -> str:
    name = spelled_as(node)
    return "sdpa" if name in (None, "scaled_dot_product_attention") else str(name)


def other_form(node: Node) -> KernelCall | None:
    """How a call of attention that is not plain SDPA is written as one."""
    if node.target is aten.scaled_dot_product_attention.default:
        call = Call(node)
        plain = is_plain(call.shape("query"), call.shape("key"), call.shape("value"))
        return None if plain else folded
    return KERNEL_CALLS.get(node.target)


ENTRY_POINTS: Mapping[object, Callable[[Node], Candidate | Near]] = {
    aten.scaled_dot_product_attention.default: scaled_dot_product,
}
