"""A function of tensors as its tile function, and both evaluated everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.ir import tiles
from ringfx.ir.tiles import Box, Expr
from ringfx.passes.exprs.lift import Lifter
from ringfx.passes.exprs.structure import first_of_equals

Tensor = torch.Tensor
VARIABLES: Sequence[Expr] = (tiles.B, tiles.H, tiles.Q, tiles.K)


@dataclass(frozen=True, eq=False)
class Lifted:
    """What the lifter says of a program's result."""

    program: GraphModule
    result: Node
    expr: Expr
    captured: Sequence[Node]
    lifter: Lifter

    def values(
        self, inputs: Sequence[Tensor], shape: Sequence[int], expr: Expr | None = None
    ) -> Tensor:
        """The result's expression, or another one over the same values, at every index."""
        reader = torch.fx.Interpreter(self.program, garbage_collect_values=False)
        reader.run(*inputs)
        read = [reader.env[n] for n in self.captured]
        sizes = (1,) * (4 - len(shape)) + tuple(shape)
        index = tiles.TileIndex(*(torch.arange(n) for n in sizes))
        return tiles.evaluate(expr or self.expr, index, read).expand(sizes).reshape(tuple(shape))


def lifted(fn: Callable[..., Any], inputs: Sequence[Tensor], *, ranged: bool = True) -> Lifted:
    """The result of ``fn``, of at most four dimensions, as a function of (b, h, q, k)."""
    traced = make_fx(lambda *xs: fn(*xs), tracing_mode="fake", pre_dispatch=True)
    program = traced(*inputs)
    (out,) = (n for n in program.graph.nodes if n.op == "output")
    result: Any = out.args[0]
    shape = (1,) * (4 - result.meta["val"].dim()) + tuple(result.meta["val"].shape)
    box = Box(**{name: (0, size) for name, size in zip("bhqk", shape, strict=True)})
    lifter = Lifter(box if ranged else None, first_of_equals(program.graph))
    expr = lifter.element(result, tuple(VARIABLES[4 - result.meta["val"].dim() :]))
    return Lifted(program, result, expr, tuple(lifter.captured), lifter)
