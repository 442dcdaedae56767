"""Each way to split a call: the programs that it serves, and the calls that one rank makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringfx.comm import conjugate, halo, halo_pools, random_draws, redistribute, token_lookup, turn
from ringfx.compile.pipeline import Lowered
from ringfx.passes.split_modes import Placement, SplitMode
from ringfx.passes.split_modes.along_tokens import Flip, Reduction, Scan, Softmax
from ringfx.passes.split_modes.attention import OwnKeys
from ringfx.passes.split_modes.concat import Concat
from ringfx.passes.split_modes.halo_convolution import HaloConvolution, HaloPool, HaloTransposed
from ringfx.passes.split_modes.labelled import Creation, Labelled
from ringfx.passes.split_modes.local_attention import LocalAttention
from ringfx.passes.split_modes.local_sort import GroupedProduct, InverseOrder, LocalSort
from ringfx.passes.split_modes.lookup import LookUp, TakeRange, TokensByNumber
from ringfx.passes.split_modes.partial_sum import PartialSum
from ringfx.passes.split_modes.random_draw import RandomDraw
from ringfx.passes.split_modes.reshape import Reshape
from ringfx.passes.split_modes.reshard import Reshard
from ringfx.passes.split_modes.roll import Roll
from ringfx.passes.split_modes.table import Arrived
from ringfx.passes.split_modes.window import Window
from tests.models import shapes, token_axes
from tests.support.programs import lowered

aten = torch.ops.aten
Tensor = torch.Tensor
TOKENS = 11
"""Padded on two ranks."""
G, S, L = (
    Placement.REPLICATED_PARTIAL_GRAD, Placement.SHARDED, Placement.RANK_LOCAL,
)  # fmt: skip


class Between(shapes.Base):
    """An operator on the tokens between two attentions."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.train()

    def forward(self, given: Tensor) -> Tensor:
        x = self.first(self.embed(given), is_causal=True)
        result: Tensor = self.second(x + self.operator(x), is_causal=True)
        return result


def convolved(x: Tensor) -> Tensor:
    kernel = torch.ones(shapes.HIDDEN, 1, 3)
    return F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=shapes.HIDDEN).transpose(1, 2)


def pooled(x: Tensor) -> Tensor:
    return F.max_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], type[SplitMode], tuple[Placement, ...], Any]] = {
    "elementwise": (lambda x: x.tanh(), Labelled, (S,), aten.tanh.default),
    "sizes": (lambda x: x[:, :, :1].expand(2, TOKENS, 24), Labelled, (S,), aten.expand.default),
    "constant": (lambda x: x.new_full((2, TOKENS, 1), 2.0), Creation, (L,), aten.new_full.default),
    "sum": (lambda x: x.sum(1, keepdim=True), PartialSum, (S,), conjugate.sum_partials),
    "mean": (lambda x: x.mean(1, keepdim=True), PartialSum, (S,), conjugate.sum_partials),
    "reshape": (lambda x: x.unflatten(2, (3, 8)).cos().flatten(2), Reshape, (S,), aten.cos.default),
    "roll": (lambda x: x.roll(1, 1), Roll, (S,), halo.roll_tokens),
    "convolution": (convolved, HaloConvolution, (S, G), halo.convolve_tokens),
    "pool": (pooled, HaloPool, (S,), halo_pools.pool_tokens),
    "shift": (lambda x: F.pad(x, (0, 0, 1, -1)), Concat, (G, S), token_lookup.join_pieces),
    "window": (lambda x: F.pad(x[:, 1:].cos(), (0, 0, 0, 1)), Window, (S,), aten.cos.default),
    "last token": (lambda x: x[:, -1:], TakeRange, (S,), token_lookup.take_range),
    "by number": (
        lambda x: x[:, torch.tensor([3, 4])].sum(1, keepdim=True), LookUp, (S, G),
        token_lookup.mask_rows,
    ),
    "turn": (
        lambda x: torch.fft.fft(x, dim=1).real, Reshard, (S,), turn.turn_tokens,
    ),
    "dropout": (lambda x: F.dropout(x, 0.5), RandomDraw, (S,), random_draws.dropout),
}  # fmt: skip
"""The operator, its mode, the placements of its operands, and a call that one rank makes."""

CONSTRUCTS: dict[str, tuple[str, type[SplitMode], tuple[Placement, ...], Any]] = {
    "sort": ("experts, inverse order", LocalSort, (S,), aten.sort.default),
    "inverse order": ("experts, inverse order", InverseOrder, (L,), aten.argsort.default),
    "product by expert": (
        "experts, inverse order", GroupedProduct, (S, G, L), aten.cumsum.default
    ),
    "reshard": ("rows of an image", Reshard, (S,), redistribute.move_tokens),
}  # fmt: skip

ELSEWHERE = {
    SplitMode: "the base",
    TokensByNumber: "the base of TakeRange and LookUp",
    HaloTransposed: "tests/end_to_end/test_upsampled.py",
    Scan: "tests/end_to_end/test_along_tokens.py",
    Flip: "tests/end_to_end/test_along_tokens.py",
    Softmax: "tests/end_to_end/test_along_tokens.py",
    Reduction: "tests/end_to_end/test_along_tokens.py",
    OwnKeys: "tests/end_to_end/test_few_queries.py",
    LocalAttention: "tests/end_to_end/test_grids.py",
    Arrived: "an input of a later program: tests/end_to_end/test_split_across_breaks.py",
}


def modes(program: Lowered, kind: type[SplitMode]) -> set[tuple[Placement, ...]]:
    found = program.local.placement.modes.values()
    return {mode.operands for mode in found if type(mode) is kind}


def targets(program: Lowered) -> set[Any]:
    return {node.target for node in program.local.graph_module.graph.nodes}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_split_in_its_way(name: str) -> None:
    operator, kind, placements, emitted = CASES[name]
    program = lowered(Between(operator), torch.zeros(2, TOKENS, dtype=torch.int64))
    assert placements in modes(program, kind)
    assert emitted in targets(program)
    assert program.local.placement.reasons == {}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_construct_is_split_in_its_way(name: str) -> None:
    construct, kind, placements, emitted = CONSTRUCTS[name]
    model: nn.Module = token_axes.Around(construct)
    program = lowered(model, *token_axes.inputs(12), ranks=2)
    assert placements in modes(program, kind)
    assert emitted in targets(program)


def test_every_mode_has_a_program_or_a_reason() -> None:
    shown = {kind for _, kind, *_ in (*CASES.values(), *CONSTRUCTS.values())}
    assert set(classes(SplitMode)) == shown | set(ELSEWHERE)


def classes(kind: type[SplitMode]) -> Iterator[type[SplitMode]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from classes(derived)
