"""Masks and biases that are no function of positions: each rank has the rows of its own queries."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import pytest
import torch

import ringfx
from ringfx.ir.note import NoteKind, texts_of
from ringfx.ops import attention
from tests.models import matrices
from tests.models.matrices import HIDDEN, MATRICES, Matrices
from tests.support.harness import Case, RankPool, compare_all
from tests.support.programs import lowered
from tests.support.sampling import one_in

STRATEGIES = ("simple", "collective", "production")
OF_PAIRS = [k for k, kind in MATRICES.items() if not kind.rows and k != "drawn"]
SAID = "each rank takes the rows of its own queries"


def loss(output: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
    return (output * weights).square().sum()


def case(kind: str, seq_len: int, strategy: str) -> Case:
    return Case(
        model=functools.partial(Matrices, kind, seq_len),
        inputs=functools.partial(matrices.inputs, kind, seq_len),
        loss=loss,
        dtype=torch.float64,
        options={"compiler": "eager", "strategy": strategy},
        label=f"{kind}, {seq_len} tokens, {strategy}",
    )


def check(pool: RankPool, cases: Sequence[Case]) -> None:
    for found in compare_all(pool, cases):
        found.check()


def cycled(seq_len: int, first: int) -> list[Case]:
    kinds = [k for k in MATRICES if k != "drawn"]
    return [case(k, seq_len, STRATEGIES[(first + i) % 3]) for i, k in enumerate(kinds)]


@pytest.mark.slow  # on three ranks below
def test_outputs_and_gradients_are_right_on_two_ranks(ranks2: RankPool) -> None:
    check(ranks2, one_in(2, cycled(13, 0)))


def test_outputs_and_gradients_are_right_on_three_ranks_where_sizes_coincide(
    ranks3: RankPool,
) -> None:
    check(ranks3, one_in(6, cycled(HIDDEN, 1)))


def drawn_difference() -> list[float]:
    stock = Matrices("drawn", 13).double()
    source = copy.deepcopy(stock)
    model = ringfx.optimize(source, compiler="eager", strategy="production")
    (x,) = matrices.inputs("drawn", 13)
    found = []
    for each in (stock, model):
        torch.manual_seed(8)
        loss(each(x.double())).backward()
        found.append([p.grad for p in (stock if each is stock else source).parameters()])
    pairs = zip(*found, strict=True)
    return [float((a - b).abs().max()) for a, b in pairs if a is not None]


def test_a_mask_that_is_drawn_is_the_unsplit_models(ranks3: RankPool) -> None:
    for found in ranks3.run(drawn_difference):
        assert max(found) < 1e-11, found


def test_ulysses_reads_the_whole(ranks2: RankPool) -> None:
    given = [k for k, kind in MATRICES.items() if kind.rows == "given"]
    check(ranks2, [case(k, 11, "ulysses") for k in one_in(3, given)])


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [4, 5, 6, 7, 8, 24])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_and_gradients_are_right_at_every_length(
    ranks3: RankPool, seq_len: int, strategy: str
) -> None:
    check(ranks3, [case(k, seq_len, strategy) for k in MATRICES if k != "drawn"])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", MATRICES)
def test_no_attention_is_given_more_than_its_own_rows(kind: str, ranks: int) -> None:
    seq_len = 48
    program = lowered(Matrices(kind, seq_len), *matrices.inputs(kind, seq_len), ranks=ranks)
    assert len(program.plan.layers) == 2
    for node in program.local.graph_module.graph.find_nodes(op="call_function", target=attention):
        for read in node.args[3]:
            assert read.meta["val"].shape.count(seq_len) < 2, read.meta["val"].shape
    said = texts_of(program.plan.notes, NoteKind.DENSE_MASK)
    whole = MATRICES[kind].rows
    assert len(said) == bool(whole), said
    assert all(f"{whole} whole" in note and SAID in note for note in said), said


@pytest.mark.parametrize("kind", OF_PAIRS)
def test_nothing_of_all_pairs_is_made_on_a_rank(kind: str) -> None:
    seq_len, ranks = 384, 4
    given = matrices.inputs(kind, seq_len)
    program = lowered(Matrices(kind, seq_len), *given, ranks=ranks)
    local = program.local.graph_module.graph
    made = [n.meta.get("val") for n in local.nodes if n.op == "call_function"]
    square = [v.shape for v in made if isinstance(v, torch.Tensor) and v.shape.count(seq_len) > 1]
    assert square == []
    moved = sum(m.bytes_moved for m in program.plan.collectives if m.kind == "all_gather")
    assert moved <= 2 * 2 * seq_len * HIDDEN * 4 * 2  # x, or less, for each layer
