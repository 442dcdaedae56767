"""Packed documents whose numbers come from the positions of their tokens.

Hugging Face numbers documents by ``d = cumsum(diff(p) != 1)`` and compares positions, ``p[k] <=
p[q]``. As d never falls, d[q] = d[k] says that between k and q every difference is 1, so that

    d[q] = d[k]   implies   p[q] - p[k] = q - k

and, together with ``d[q] == d[k]``, a condition on differences of p is one on positions: the mask
is causal, its window a window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Node

from ringfx.ir.tiles import Box, Expr, K, Q, const, map_children, terms, walk
from ringfx.ir.tiles.linear_forms import ONE, linear
from ringfx.ir.tiles.operators import COMPARISONS
from ringfx.passes.axes.call import Call
from ringfx.passes.exprs.lift import Lifter
from ringfx.passes.exprs.simplify import simplify

__all__ = ["in_positions"]

aten = torch.ops.aten


def in_positions(
    keep: Expr | None, captured: Sequence[Node], same: Mapping[Node, Node]
) -> Expr | None:
    """The mask with differences of token positions inside a document as those of indices."""
    parts = terms(keep)
    for part in parts:
        for position in _positions(part, captured, same):
            parts = tuple(_rewritten(p, *position) for p in parts)
    return functools.reduce(functools.partial(simplify, "and"), parts) if parts else None


def _positions(
    term: Expr, captured: Sequence[Node], same: Mapping[Node, Node]
) -> list[tuple[Expr, Expr]]:
    """For a comparison of document numbers, how positions of query and key are read."""
    if term[0] != "eq" or any(side[0] != "at" for side in term[1:]):
        return []
    left, right = term[1:]
    if left[1:-1] != right[1:-1] or {left[-1], right[-1]} != {Q, K}:
        return []
    node, prefix = captured[left[1]], left[2:-1]
    source = _numbered_by(node, prefix, same)
    if source is None or source[0] not in captured:
        return []
    place = captured.index(source[0])
    return [(("at", place, *source[1], Q), ("at", place, *source[1], K))]


def _numbered_by(
    node: Node, prefix: Sequence[Expr], same: Mapping[Node, Node]
) -> tuple[Node, Sequence[Expr]] | None:
    """p and its leading indices, if the node is ``cumsum(p[i] - p[i - 1] != 1)`` along the last
    dimension (whatever stands for p[-1])."""
    if node.target is not aten.cumsum.default:
        return None
    call = Call(node)
    shape = call.shape("self")
    if call["dim"] % len(shape) != len(shape) - 1 or shape[-1] < 2:
        return None
    lifter = Lifter(Box(q=(1, int(shape[-1])), k=(0, 1)), same)
    step = lifter.element(call["self"], (*prefix, Q))
    if step[0] not in ("ne", "int") or (step[0] == "int" and step[1][0] != "ne"):
        return None
    step = step if step[0] == "ne" else step[1]
    parts = dict(linear(("sub", *step[1:])))
    reads = [e for e in parts if e[0] == "at" and parts[e] == 1]
    if len(reads) != 1 or parts.pop(ONE, 0) != -1:
        return None
    here = reads[0]
    before = (*here[:-1], ("sub", Q, const(1)))
    source = lifter.captured[here[1]]
    counted = not source.meta["val"].dtype.is_floating_point
    if here[-1] != Q or parts != {here: 1, before: -1} or not counted:
        return None
    return source, here[2:-1]


def _rewritten(term: Expr, at_q: Expr, at_k: Expr) -> Expr:
    """The term with ``at_q - at_k`` as ``q - k``, if it reads positions in no other way."""
    found = _differences(term, at_q, at_k)
    read = {at_q, at_k}
    return term if any(part in read for part in walk(found)) else found


def _differences(expr: Expr, at_q: Expr, at_k: Expr) -> Expr:
    head, *args = expr
    if head in COMPARISONS:
        parts = dict(linear(("sub", *args)))
        times = parts.pop(at_q, 0)
        if times and parts.pop(at_k, 0) == -times:
            return _comparison(head, parts, times)
    if head in ("add", "sub"):
        parts = dict(linear(expr))
        times = parts.pop(at_q, 0)
        if times == 1 and parts == {at_k: -1}:
            return simplify("sub", Q, K)
        if times == -1 and parts == {at_k: 1}:
            return simplify("sub", K, Q)
    if head == "at":
        return expr
    return map_children(lambda e: _differences(e, at_q, at_k), expr, simplify)


def _comparison(head: str, rest: Mapping[Expr, int], times: int) -> Expr:
    """``times * (q - k) + rest`` compared with 0."""
    scaled: Callable[[Expr, int], Expr] = lambda e, c: simplify("mul", e, const(c))  # noqa: E731
    left = scaled(simplify("sub", Q, K), times) if abs(times) != 1 else Q if times == 1 else K
    right = K if times == 1 else Q if times == -1 else const(0)
    for part, count in rest.items():
        number = const(-count * 1) if part == ONE else scaled(part, -count)
        right = simplify("add", right, number)
    return simplify(head, left, right)
