"""Values that depend on no input are computed while planning, and recognised when they are simple.

A Hugging Face model without an attention mask derives packed documents from its own position_ids:
``(diff(arange(S)) != 1).cumsum()``. That is the constant 0, and the mask plain causal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ringfx.ir.tiles import Expr, const
from ringfx.passes.exprs.simplify import simplify
from ringfx.torch_compat.dispatch import disable_current_modes
from ringfx.torch_compat.fake_tensors import unset_fake_temporarily

__all__ = ["fold_constant"]

MAX_ELEMENTS = 1 << 24
"""Larger constants are captured, not computed (64 MiB of int32)."""


def fold_constant(node: Node, index: tuple[Expr, ...]) -> Expr | None:
    """The element of an input-free value, if the value is constant or affine in one index."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype.is_complex:
        return None
    closure = _closure(node)
    if closure is None or any(_numel(n) > MAX_ELEMENTS for n in closure):
        return None
    computed = _compute(node, closure)
    return None if computed is None else _as_expression(computed, index)


def _numel(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _closure(node: Node) -> list[Node] | None:
    """Everything the node needs, in program order; None if that includes an input."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        if current.op in ("placeholder", "get_attr"):
            return None
        tags = getattr(current.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags or len(seen) > 512:
            return None
        seen.add(current)
        stack.extend(current.all_input_nodes)
    return [n for n in node.graph.nodes if n in seen]


def _compute(node: Node, closure: list[Node]) -> torch.Tensor | None:
    env: dict[Node, Any] = {}
    with unset_fake_temporarily(), disable_current_modes(), torch.no_grad():
        for current in closure:
            args, kwargs = torch.fx.node.map_arg((current.args, current.kwargs), env.__getitem__)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": torch.device("cpu")}
            env[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    result = env[node]
    return result if isinstance(result, torch.Tensor) else None


def _as_expression(value: torch.Tensor, index: tuple[Expr, ...]) -> Expr | None:
    if value.numel() == 0:
        return None
    first = value.flatten()[0].item()
    if bool((value == first).all()):
        return const(first)
    for d, size in enumerate(value.shape):
        if size < 2:
            continue
        line = value.movedim(d, -1).reshape(-1, size)
        row = line[0]
        step = (row[1].to(torch.float64) - row[0].to(torch.float64)).item()
        ramp = first + step * torch.arange(size, dtype=torch.float64)
        if value.dtype != torch.bool and bool((line.to(torch.float64) == ramp).all()):
            number = (lambda x: x) if value.dtype.is_floating_point else int
            scaled = simplify("mul", index[d], const(number(step)))
            return simplify("add", scaled, const(first))
    return None
