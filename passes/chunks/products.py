"""Sums over chunks that end in a matrix product: their program gives the factors instead.

A weight's gradient is a sum over tokens of one product. As a result of each chunk it would exist
beside the sum, as large; given its factors, the product is added to the sum in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = ["SUMMED_IN_PLACE", "factors_apart"]

aten = torch.ops.aten
SUMMED_IN_PLACE = (torch.float32, torch.float64)
"""Types of products that are added to their sum as they are; others are summed in float32."""


def factors_apart(program: GraphModule, sums: Sequence[int]) -> tuple[int, ...]:
    """Replace results that are products of matrices by their two factors.

    Parameters
    ----------
    program
        Changed: of a result [m, n] that is ``left @ right``, it returns ``left`` [m, k] and
        ``right`` [k, n].
    sums
        The results that are sums over chunks.

    Returns
    -------
    Those of ``sums`` that are given by their factors now, in ascending order.
    """
    output = program.graph.output_node()
    given = list(output.args[0])  # type: ignore[arg-type]
    products = {i: found for i in sums if (found := _product(given[i]))}
    results: list[Any] = []
    for i, result in enumerate(given):
        if i not in products:
            results.append(result)
            continue
        product, transposed = products[i]
        with program.graph.inserting_before(output):
            results.extend(_factors(program, product, transposed))
    output.args = (tuple(results),)
    program.graph.eliminate_dead_code()
    program.recompile()
    return tuple(sorted(products))


def _product(result: object) -> tuple[Node, bool] | None:
    """The product of matrices that a result is, and whether it is transposed."""
    transposed = False
    while isinstance(result, Node) and len(result.users) == 1:
        if result.target is aten.mm.default:
            summed = result.meta["val"].dtype in SUMMED_IN_PLACE
            return (result, transposed) if summed else None
        if result.target in (aten.t.default, aten.transpose.int, aten.permute.default):
            transposed ^= _swaps(result)
        elif result.target is not aten.detach.default:
            return None
        result = result.args[0]
    return None


def _swaps(view: Node) -> bool:
    """Whether a view of a matrix exchanges its two dims."""
    before = view.args[0]
    assert isinstance(before, Node)
    marked = before.meta["val"].new_empty((1, 2), device="meta")
    changed = view.target(marked, *view.args[1:])  # type: ignore[operator]
    return tuple(changed.shape) == (2, 1)


def _factors(program: GraphModule, product: Node, transposed: bool) -> Iterator[Node]:
    left, right = product.args
    if not transposed:
        yield from (left, right)  # type: ignore[misc]
        return
    for factor in (right, left):
        turned = program.graph.call_function(aten.t.default, (factor,))
        turned.meta["val"] = factor.meta["val"].t()  # type: ignore[union-attr]
        yield turned
