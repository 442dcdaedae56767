"""Across a graph break a split value stays split: equal results, and nothing is gathered."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ringfx
from tests.end_to_end.models import tokens
from tests.models.across_breaks import (
    Branching,
    Contiguous,
    Heads,
    InnerGradient,
    InputsTrain,
    Inside,
    Lost,
    Modules,
    Needy,
    NoTokens,
    Python,
    ReadThenWritten,
    Shapely,
    TiedAcross,
    Turned,
    Viewed,
    WindowWritten,
    Writing,
)
from tests.models.shapes import HIDDEN, VOCAB, Causal
from tests.support.harness import (
    Case,
    Comparison,
    RankPool,
    compare_all,
    compare_here,
    gradient_differences,
    raises,
)
from tests.support.recorded import recorded

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor
OPTIONS: dict[str, Any] = {"compiler": "eager", "strategy": "production"}


def ids(length: int, batch: int = 2) -> Callable[[], tuple[Tensor]]:
    return functools.partial(_ids, length, batch)


def _ids(length: int, batch: int) -> tuple[Tensor]:
    return (tokens(length, batch, vocab=VOCAB),)


def embeddings() -> tuple[Tensor]:
    return (torch.randn(2, 13, HIDDEN, dtype=torch.float64).requires_grad_(),)


def square(output: Tensor) -> Tensor:
    return output.square().mean()


def case(model: Any, inputs: Any = None, **changes: Any) -> Case:
    return Case(
        model=model, inputs=inputs or ids(13), loss=square, dtype=torch.float64,
        label=model.__name__, options=OPTIONS, **changes,
    )  # fmt: skip


@dataclass(frozen=True)
class Crossed:
    """What one rank saw of a case."""

    comparison: Comparison
    programs: int
    gathers: tuple[str, ...]
    """What the plan says is gathered, in programs and between them."""
    wide: int
    """Messages in which a rank gives all of its hidden states."""


def crossed(cases: Sequence[Case]) -> list[Crossed]:
    return [_crossed(case) for case in cases]


def _crossed(case: Case) -> Crossed:
    made: list[Any] = []

    def keep(model: nn.Module, **options: Any) -> nn.Module:
        optimized = ringfx.optimize(model, **options)
        made.append(optimized)
        return optimized

    with recorded() as messages:
        comparison = compare_here(dataclasses.replace(case, optimize=keep))
    plan = made[0].plan
    moved = [f"{m.kind} {m.name}: {m.reason}" for m in plan.collectives if m.kind.gathers]
    batch, length = case.inputs()[0].shape[:2]  # type: ignore[index]
    part = batch * (length // dist.get_world_size()) * HIDDEN * 8
    wide = sum(m == "all_gather" and m.num_bytes >= part for m in messages)
    return Crossed(comparison, len(made[0]._ringfx_shared.backend.ran), tuple(moved), wide)


def lengths_in_turn(lengths: Sequence[int]) -> list[dict[str, float]]:
    """Differences of gradients after each of several calls of one model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = Inside().double()
    model = copy.deepcopy(stock)
    optimized = ringfx.optimize(model, **OPTIONS)
    found = []
    for length in lengths:
        for call in (stock, optimized):
            square(call(*_ids(length, 1))).backward()  # type: ignore[no-untyped-call]
        ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, stock))
        found.append(gradient_differences(ours, theirs))
        for owner in (stock, model):
            owner.zero_grad()
    return found


def warned(case: Case) -> list[str]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep = Keep()
    logging.getLogger("ringfx").addHandler(keep)
    try:
        compare_here(case).check()
    finally:
        logging.getLogger("ringfx").removeHandler(keep)
    return lines


CASES = (
    case(Branching),
    case(Contiguous),
    case(Contiguous, ids(3)),
    case(TiedAcross),
    case(Shapely),
    case(Writing),
    case(Python),
    case(Heads),
    case(Branching, ids(14), backward=False, steps=2),
)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_what_crosses_a_break_stays_split(ranks: int, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
    cases = CASES if ranks == 2 else CASES[2:8:2]
    for found in pool.run(crossed, cases):
        for case, one in zip(cases, found, strict=True):
            one.comparison.check()
            assert one.programs > 1, case.label
            assert not one.gathers, (case.label, one.gathers)
            assert one.wide == 1, case.label  # the test reads the output


def logits_squared(output: tuple[Tensor, Tensor]) -> Tensor:
    return square(output[0])


AT_THE_EDGE = (
    case(WindowWritten, ids(16)),
    case(InnerGradient),
    case(Viewed),
    case(Turned),
    dataclasses.replace(case(NoTokens), loss=logits_squared),
)


def test_what_leaves_a_program_whole_or_empty_has_its_gradient(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, AT_THE_EDGE):
        found.check()


TRAINED_BEFORE = (case(InputsTrain, embeddings), case(Inside, ids(17)), case(Modules))
"""What is split was whole before: its gradient must be."""


def test_only_gradients_of_what_came_whole_are_gathered(ranks3: RankPool) -> None:
    for found in ranks3.run(crossed, TRAINED_BEFORE):
        for case, one in zip(TRAINED_BEFORE, found, strict=True):
            one.comparison.check()
            (gradient,) = {g.split(":")[0] for g in one.gathers}
            assert gradient.startswith("all_gather_gradient"), case.label
            assert one.wide == 1 + len(one.gathers), case.label


def test_what_python_needs_whole_is_gathered_once_and_announced(ranks2: RankPool) -> None:
    for lines in ranks2.run(warned, case(Needy)):
        gathers = [x for x in lines if "gathers" in x and "across_breaks.py" in x]
        assert len(gathers) == 1, lines
        assert "output 0 (first" in gathers[0]
        assert "in needs_all, which runs outside the compiled programs" in gathers[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_write_after_a_read_that_gathered_is_seen(
    ranks: int, request: pytest.FixtureRequest
) -> None:
    pool = request.getfixturevalue(f"ranks{ranks}")
    for comparison in compare_all(pool, (case(ReadThenWritten),)):
        comparison.check()


def test_other_lengths_are_planned_anew(ranks3: RankPool) -> None:
    for found in ranks3.run(lengths_in_turn, (13, 16, 13, 4)):
        for differences in found:
            assert max(differences.values()) < 1e-10, differences


class TurnedOutside(Causal):
    """Its caller changes the shape of its result in place."""


def with_one_more_dimension(output: Tensor) -> Tensor:
    return output.unsqueeze_(0).square().mean()


def without_gradients(case: Case) -> None:
    with torch.no_grad():
        compare_here(dataclasses.replace(case, backward=False))


def test_a_shape_changed_in_place_outside_stays_split_on_the_way_to_a_loss(
    ranks2: RankPool,
) -> None:
    outside = dataclasses.replace(case(TurnedOutside), loss=with_one_more_dimension)
    for comparison in compare_all(ranks2, (outside,)):
        comparison.check()


def test_a_shape_changed_in_place_where_all_tokens_would_be_needed_is_refused(
    ranks2: RankPool,
) -> None:
    outside = dataclasses.replace(case(TurnedOutside), loss=with_one_more_dimension)
    for text in raises(ranks2, without_gradients, outside):
        assert "SplitWrite" in text
        assert "changes its shape in place" in text
        assert "Do: make a new tensor" in text


def test_a_write_that_a_row_taken_before_would_not_show_is_refused(ranks2: RankPool) -> None:
    for text in raises(ranks2, crossed, (case(Lost),)):
        assert "SplitWrite" in text
        assert "output 0 (first" in text
        assert "the other would not see the write" in text
