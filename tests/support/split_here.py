"""A model split over ranks that are threads of this process, beside the unsplit one: quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.comm import conjugate
from ringfx.comm.world import World
from ringfx.compile.pipeline import Lowered, lower
from ringfx.compile.settings import Settings
from ringfx.ir.note import NoteKind, texts_of
from ringfx.passes.rewrite.local import SplitOutput
from ringfx.passes.verify.check import line_inputs
from tests.passes.rewrite.virtual_ranks import run_on_ranks
from tests.support.direct import called, results_of, worst

__all__ = ["SplitHere", "split_here"]

Tensor = torch.Tensor
GROUP = "threads"


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitHere:
    """The program, and how far any rank's outputs and gradients are from the unsplit ones."""

    program: Lowered
    worst: float
    results: Sequence[list[Tensor]]
    """Of each rank: outputs, and gradients of parameters and arguments."""

    @property
    def ranks(self) -> int:
        return len(self.results)

    @property
    def strategies(self) -> list[str]:
        return [layer.strategy for layer in self.program.plan.layers]

    @property
    def whole(self) -> list[str]:
        """What is announced as computed whole on every rank."""
        return texts_of(self.program.plan.notes, NoteKind.WHOLE)

    @property
    def gathered(self) -> list[str]:
        """What is gathered whole in forward, and why."""
        found = self.program.plan.collectives
        return [m.reason for m in found if m.kind.gathers and not m.in_backward]


def split_here(
    model: nn.Module,
    args: Sequence[Tensor],
    ranks: int,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> SplitHere:
    """``model`` gives a tensor or several; every floating argument has a gradient."""
    model = model.to(dtype)
    given = [x.to(dtype) if x.is_floating_point() else x for x in args]
    values = [*(p.detach().clone() for p in model.parameters()), *given]

    def call(*values: Tensor) -> list[Tensor]:
        found = called(model, *values)
        return [found] if isinstance(found, Tensor) else list(found)

    expected = results_of(call, values)
    held = len(list(model.parameters()))
    leaves = [
        nn.Parameter(v.clone()) if i < held else v.clone().requires_grad_(v.is_floating_point())
        for i, v in enumerate(values)
    ]
    with torch.enable_grad():
        graph = make_fx(call, pre_dispatch=True)(*leaves)
    program = lower(graph, leaves, Settings.of(options), World(ranks, 0, GROUP))

    def run(rank: int) -> list[Tensor]:
        return results_of(_whole_outputs(program, rank), values)

    found = run_on_ranks(ranks, run)
    return SplitHere(
        program=program, worst=max(worst(each, expected) for each in found), results=found
    )


def _whole_outputs(program: Lowered, rank: int) -> Callable[..., list[Tensor]]:
    local = program.local
    extra = line_inputs(local.placement.lines, rank, "cpu")

    def run(*values: Tensor) -> list[Tensor]:
        with torch.fx.traceback.preserve_node_meta(False):
            found = torch.fx.Interpreter(local.graph_module).run(*values, *extra)
        return [_whole(x, out, program, rank) for x, out in zip(found, local.outputs, strict=True)]

    return run


def _whole(x: Tensor, output: SplitOutput | None, program: Lowered, rank: int) -> Tensor:
    if output is None:
        return x
    tokens = output.token_dim
    layout, member = program.local.placement.lines.lines[tokens.line].layout, tokens.member
    own = layout.positions(rank) - member.offset
    valid = (own >= 0) & (own < member.length)
    order = layout.order()[member.offset : member.offset + member.length]
    where = (layout.world_size, GROUP, tokens.dim, tokens.outer, tokens.inner, "an output")
    return conjugate.all_gather_grad_slice(x, own.remainder(member.length), order, valid, *where)
