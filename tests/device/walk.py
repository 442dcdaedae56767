"""Backward without autograd's engine, which wants a driver for CUDA tensors, fake ones too.

The nodes of the graph can be called one by one; this is the engine's order in a few lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["backward", "grad"]


def backward(outputs: Sequence[torch.Tensor]) -> int:
    """Runs every node behind the outputs on gradients of ones; returns how many ran."""
    return _walk(outputs, [torch.ones_like(x) for x in outputs])[0]


def grad(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad_outputs: Sequence[torch.Tensor | None] | None = None,
    *,
    allow_unused: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """``torch.autograd.grad``, of inputs that nothing before them was computed for."""
    assert allow_unused
    given = grad_outputs or [None] * len(outputs)
    ones = [torch.ones_like(x) if g is None else g for x, g in zip(outputs, given, strict=True)]
    _, ends = _walk(outputs, ones)
    of_leaves = {id(n.variable): n for n in ends if hasattr(n, "variable")}
    nodes = [(of_leaves.get(id(x)) if x.grad_fn is None else x.grad_fn) for x in inputs]
    return tuple(ends.get(node) for node in nodes)


def _walk(
    outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> tuple[int, dict[Any, torch.Tensor]]:
    """How many nodes ran, and the gradients that arrived at those where the graph ends."""
    pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if x.grad_fn is not None]
    roots: list[Any] = [x for x, _ in pairs]
    waits = _uses([x.grad_fn for x in roots])
    slots: dict[Any, dict[int, torch.Tensor]] = {}
    ends: dict[Any, torch.Tensor] = {}
    for x, gradient in pairs:
        _add(slots, x.grad_fn, x.output_nr, gradient)
    starts = dict.fromkeys(x.grad_fn for x in roots)
    ready = [node for node in starts if not waits[node]]
    ran = 0
    while ready:
        node = ready.pop()
        given = slots.pop(node, {})
        results = _call(node, given) if given else ()
        ran += 1
        for i, (after, slot) in enumerate(node.next_functions):
            if after is None:
                continue
            if i < len(results) and isinstance(results[i], torch.Tensor):
                _add(slots, after, slot, results[i])
            waits[after] -= 1
            if not waits[after] and after.next_functions:
                ready.append(after)
            elif not waits[after] and slots.get(after):
                ends[after] = slots[after][0]
    missed = {n for n in (*starts, *waits) if n.next_functions and waits[n]}
    assert not missed, f"{len(missed)} nodes never ran, such as {missed.pop().name()}"
    return ran, ends


def _uses(roots: Sequence[Any]) -> Counter[Any]:
    """How many edges lead to each node."""
    found: Counter[Any] = Counter()
    seen = set(roots)
    todo = list(seen)
    while todo:
        for after, _ in todo.pop().next_functions:
            if after is None:
                continue
            found[after] += 1
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return found


def _add(slots: dict[Any, dict[int, torch.Tensor]], node: Any, slot: int, x: torch.Tensor) -> None:
    held = slots.setdefault(node, {})
    held[slot] = held[slot] + x if slot in held else x


def _call(node: Any, given: dict[int, torch.Tensor]) -> tuple[Any, ...]:
    width = len(node._input_metadata)
    # As the engine does: the gradient of what was broadcast is summed.
    gradients = [
        given[i].sum_to_size(node._input_metadata[i].shape) if i in given else None
        for i in range(width)
    ]
    apply = getattr(node, "apply", None)
    results = apply(*gradients) if apply is not None else node(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    edges = node.next_functions
    if len(results) == len(edges):
        return results
    # A function in Python gives None for its inputs that are no tensors, which have no edge.
    found = iter([x for x in results if x is not None])
    return tuple(None if after is None else next(found) for after, _ in edges)
