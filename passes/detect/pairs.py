"""An einsum of three and more operands beside a softmax, as products of two.

Detection reads products of queries with keys and of weights with values. ``bhqd,bhkd,h->bhqk`` is
one of two operands and a multiplication, ``bhqk,bhkd,ehd->bqe`` two products. Those are contracted
first whose result is smallest.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ringfx.passes.axes.call import Call
from ringfx.passes.detect.inline_kernel_calls import inline
from ringfx.passes.detect.names import BROADCASTS, VIEWS
from ringfx.passes.detect.softmax import ROOTS
from ringfx.passes.detect.walk import is_elementwise

__all__ = ["contract_in_pairs", "leads_to_softmax"]

aten = torch.ops.aten
SOFTMAXES = frozenset({
    *ROOTS, aten.log_softmax.int, aten._log_softmax.default, aten.logsumexp.default,
})  # fmt: skip
NEAR = 24
"""Calls between an einsum and a softmax."""


def contract_in_pairs(graph: Graph) -> None:
    """Rewrite every such einsum; the program computes the same."""
    for node in list(graph.nodes):
        if node.target is not aten.einsum.default or not _is_plain(node):
            continue
        if leads_to_softmax(node, lambda n: iter(n.users)) or any(
            leads_to_softmax(n, lambda n: iter(n.all_input_nodes)) for n in node.all_input_nodes
        ):
            equation, operands = Call(node)["equation"], Call(node)["tensors"]
            given: dict[str, Any] = {f"x{i}": x for i, x in enumerate(operands)}
            node.replace_all_uses_with(inline(node, _pairwise(equation), named=False, **given))
            graph.erase_node(node)


def _is_plain(node: Node) -> bool:
    equation = Call(node)["equation"].replace(" ", "")
    terms = equation.split("->")[0].split(",")
    repeated = any(len(set(t)) != len(t) for t in terms)
    return len(terms) > 2 and "->" in equation and "." not in equation and not repeated


def leads_to_softmax(start: Node, step: Callable[[Node], Iterator[Node]]) -> bool:
    """Whether one is a few elementwise calls and views away."""
    queue, seen = deque([start]), set[Node]()
    while queue and len(seen) < NEAR:
        node = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        if node.target in SOFTMAXES:
            return True
        if node is start or is_elementwise(node) or node.target in VIEWS | BROADCASTS:
            queue.extend(step(node))
    return False


def _pairwise(equation: str) -> Callable[..., Tensor]:
    inputs, out = equation.replace(" ", "").split("->")

    def run(**given: Tensor) -> Tensor:
        values = list(zip(inputs.split(","), given.values(), strict=True))
        while len(values) > 1:
            i, j = min(
                itertools.combinations(range(len(values)), 2),
                key=lambda pair: _size(values, _kept(values, pair, out)),
            )
            kept = _kept(values, (i, j), out)
            made = kept, _product(values[i], values[j], kept)
            values = [*(v for n, v in enumerate(values) if n not in (i, j)), made]
        ((_, result),) = values
        return result

    return run


def _kept(values: Sequence[tuple[str, Tensor]], pair: tuple[int, ...], out: str) -> str:
    """Labels of a pair that the result or another operand has, in the result's order."""
    others = "".join(t for n, (t, _) in enumerate(values) if n not in pair)
    have = dict.fromkeys("".join(values[n][0] for n in pair))
    wanted = [x for x in out if x in have]
    return "".join([*wanted, *(x for x in have if x in others and x not in wanted)])


def _size(values: Sequence[tuple[str, Tensor]], labels: str) -> int:
    sizes = {x: s for t, v in values for x, s in zip(t, v.shape, strict=True)}
    return math.prod(sizes[x] for x in labels)


def _product(a: tuple[str, Tensor], b: tuple[str, Tensor], kept: str) -> Tensor:
    if set(a[0] + b[0]) > set(kept):
        return torch.einsum(f"{a[0]},{b[0]}->{kept}", a[1], b[1])
    left, right = (_spread(*x, kept) for x in (a, b))
    return left * right


def _spread(labels: str, value: Tensor, kept: str) -> Tensor:
    """The operand with its dimensions in the result's order, and 1 where it has none."""
    value = value.permute([labels.index(x) for x in kept if x in labels])
    return value[tuple(slice(None) if x in labels else None for x in kept)]
