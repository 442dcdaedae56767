"""Every row of the conformance table: carried with equal results, or refused by name and line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ringfx.errors import RingfxError
from tests.models.constructs import total
from tests.models.transforms import flex_trains
from tests.passes.capture.conformance import PAGE, ROWS, Row, page
from tests.support.harness import Case, Comparison, RankDifference, compare_here
from tests.support.harness import _compare_cases as compare_cases
from tests.support.ranks import RankPool
from tests.support.sampling import one_in

CARRIED = [row for row in ROWS if not row.refused]
REFUSED = [row for row in ROWS if row.refused]
SAMPLE = (
    "selective checkpointing", "an autograd.Function", "inference_mode", "dropout",
    "fused nn.TransformerEncoderLayer, padding", "keys and values of every layer (use_cache)",
)  # fmt: skip


def case(row: Row) -> Case:
    return Case(
        model=row.model, inputs=row.inputs, dtype=torch.float64, loss=total, backward=row.trains,
        options={"compiler": "eager"}, steps=row.steps, label=row.name,
    )  # fmt: skip


@pytest.mark.parametrize("row", one_in(6, CARRIED), ids=lambda row: row.name)
def test_carried_with_outputs_and_gradients_of_eager(row: Row) -> None:
    with flex_trains():
        compare_here(case(row)).check()


def on_a_rank(names: tuple[str, ...]) -> list[RankDifference]:
    with flex_trains():
        return compare_cases([case(row) for row in CARRIED if row.name in names])


@pytest.mark.parametrize(
    "names",
    [SAMPLE, pytest.param(tuple(row.name for row in CARRIED), marks=pytest.mark.slow, id="all")],
)
def test_carried_on_two_ranks(ranks2: RankPool, names: tuple[str, ...]) -> None:
    by_rank = ranks2.run(on_a_rank, names, timeout_s=900)
    for row, ranks in zip(
        [r for r in CARRIED if r.name in names], zip(*by_rank, strict=True), strict=True
    ):
        Comparison(label=row.name, dtype=torch.float64, ranks=tuple(ranks)).check()


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused_by_name_and_line(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    with pytest.raises(Exception, match=re.escape(row.refused)) as caught:
        optimized(model)(*inputs)
    text = str(caught.value)
    assert isinstance(caught.value, RingfxError), text
    assert re.search(r"\w+\.py:\d+", text), text
    assert "Do: " in text


def optimized(model: torch.nn.Module) -> Any:
    import ringfx

    return ringfx.optimize(model, compiler="eager")


def test_names_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.passes.capture.conformance"
