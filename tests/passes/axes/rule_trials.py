"""A call of an operator on whole tensors beside what its row of the axis table says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisSharing, Call, OpAxes, result_values
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.axes.space import AxisSpace
from tests.passes.axes.sample import Sample

__all__ = ["Dims", "Trial", "sharing", "tried"]

Dims = Sequence[tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Trial:
    """A call on whole tensors, and what its row says of it."""

    sample: Sample
    node: Node
    call: Call
    axes: OpAxes
    operands: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]
    operand_dims: tuple[Dims | None, ...]
    result_dims: tuple[Dims, ...]

    def sizes(self) -> dict[Any, int]:
        """The size of every label, from the dimensions that it fills alone or with known ones."""
        found: dict[Any, int] = {}
        given = [
            (size, dim)
            for tensors, dims in (
                (self.operands, self.operand_dims),
                (self.results, self.result_dims),
            )
            for tensor, labels in zip(tensors, dims, strict=True)
            if labels is not None
            for size, dim in zip(tensor.shape, labels, strict=True)
        ]
        for size, dim in sorted(given, key=lambda pair: len(pair[1])):
            known = 1
            for label in dim:
                known *= found.get(label, 1)
            unknown = [label for label in dim if label not in found]
            assert len(unknown) <= 1, (self.sample, dim)
            for label in unknown:
                found[label] = size // known
            assert size == (known if not unknown else size // known * known), (self.sample, dim)
        return found


def tried(sample: Sample) -> Trial:
    graph = Graph()

    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = graph.placeholder("x")
            node.meta["val"] = value
            return node
        return [placed(v) for v in value] if isinstance(value, list) else value

    args = tuple(placed(a) for a in sample.args)
    kwargs = {k: placed(v) for k, v in sample.kwargs.items()}
    node = graph.call_function(sample.op, args, kwargs)
    torch.manual_seed(0)
    node.meta["val"] = sample.op(*sample.args, **sample.kwargs)
    call = Call(node)
    rule = find_rule(sample.op)
    assert rule is not None, sample.op
    axes = rule(call)
    operands = tuple(n.meta["val"] for n in call.operands)
    results = result_values(node)
    assert [len(x) for x in axes.results] == [r.dim() for r in results], sample
    for x, dims in zip(operands, axes.operands, strict=True):
        assert dims is None or len(dims) == x.dim(), sample
    operand_dims: tuple[Dims | None, ...] = axes.operands
    result_dims: tuple[Dims, ...] = axes.results
    if isinstance(axes.how, how.Reshape):
        operand_dims, result_dims = regrouped(operands, results)
    return Trial(sample, node, call, axes, operands, results, operand_dims, result_dims)


def sharing(trial: Trial, label: Any) -> AxisSharing:
    reshapes = isinstance(trial.axes.how, how.Reshape)
    return AxisSharing.INDEPENDENT if reshapes else trial.axes.share_of(label)


def regrouped(
    operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> tuple[tuple[Dims | None, ...], tuple[Dims, ...]]:
    """The atoms of a reshape, as the axis space cuts them."""
    space = AxisSpace()
    before = [space.fresh(size) for size in operands[0].shape]
    after = space.regroup(before, [int(s) for s in results[0].shape])
    first = tuple(space.resolve(dim) for dim in before)
    return (first, *(None for _ in operands[1:])), (tuple(space.resolve(d) for d in after),)
