"""Backward without autograd's engine, which wants a driver for CUDA tensors, fake ones too.

The nodes of the graph can be called one by one; this is the engine's order in a few lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["backward"]


def backward(outputs: Sequence[torch.Tensor]) -> int:
    """Runs every node behind the outputs on gradients of ones; returns how many ran."""
    roots: list[Any] = [x for x in outputs if x.grad_fn is not None]
    waits = _uses([x.grad_fn for x in roots])
    slots: dict[Any, dict[int, torch.Tensor]] = {}
    for x in roots:
        _add(slots, x.grad_fn, x.output_nr, torch.ones_like(x))
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
    missed = {n for n in (*starts, *waits) if n.next_functions and waits[n]}
    assert not missed, f"{len(missed)} nodes never ran, such as {missed.pop().name()}"
    return ran


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
    gradients = [given.get(i) for i in range(width)]
    apply = getattr(node, "apply", None)
    results = apply(*gradients) if apply is not None else node(*gradients)
    return results if isinstance(results, tuple) else (results,)
