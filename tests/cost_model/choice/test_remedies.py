"""What an error names where nothing fits does fit, with the figure that it says."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest

from ringfx.cost_model.choice import infeasible
from ringfx.errors import OutOfMemory
from ringfx.units.parse import parse_bytes
from tests.cost_model.choice.test_layers_again import again, planned
from tests.cost_model.sites import budget_for

NOTHING: dict[str, Any] = {"recompute": "none", "chunks": "none", "optimizer": "adamw"}


def refused(budget: int, **options: Any) -> list[str]:
    """The lines of what to do."""
    with pytest.raises(OutOfMemory) as caught:
        planned(gpu_memory=budget, **options)
    _, _, do = str(caught.value).partition("  Do")
    return [line.strip(" ,.:") for line in do.removeprefix(" one of these:").strip().split("\n")]


def figure(line: str) -> int:
    """Bytes that a line says."""
    found = re.search(r"\(([0-9.]+ [KMGT]?i?B)", line)
    assert found is not None, line
    return parse_bytes(found[1])


def between(low: int, high: int) -> int:
    return budget_for((low + high) // 2)


def test_layers_computed_again() -> None:
    whole, less = planned(**NOTHING), planned(**{**NOTHING, "recompute": "layers"})
    budget = between(less.memory.peak_bytes, whole.memory.peak_bytes)
    lines = refused(budget, **NOTHING)
    (first,) = (line for line in lines if line.startswith('recompute="auto" ('))
    plan = planned(gpu_memory=budget, **{**NOTHING, "recompute": "auto"})
    assert f"{again(plan)} of 6 layers computed again" in first
    assert "more a step" in first
    assert first == lines[0], "what costs no machine comes first"
    ranks, tokens = (
        int(next(x for x in lines if f"{of} or " in x).split()[0].replace(",", ""))
        for of in ("ranks", "tokens")
    )
    for enough in ({"ranks": ranks}, {"tokens": tokens}):
        assert planned(gpu_memory=budget, **NOTHING, **enough).memory.peak_bytes <= budget
    for short in ({"ranks": ranks - 1}, {"tokens": tokens + 64}):
        refused(budget, **NOTHING, **short)


def test_what_would_fit_is_looked_for_once() -> None:
    """Though regions are planned at once and in chunks."""
    with mock.patch.object(infeasible, "remedies", wraps=infeasible.remedies) as looked_for:
        lines = refused(parse_bytes("6MiB"), optimizer="adamw")
    assert looked_for.call_count == 1
    assert "ranks or more" in lines[0]


STATES: dict[str, Any] = {"tokens": 1024, "chunks": "none", "optimizer": 64}


def test_sharded_states() -> None:
    whole, shared = (
        planned(recompute="attention", shard_states=x, **STATES) for x in (False, True)
    )
    budget = between(shared.memory.peak_bytes, whole.memory.peak_bytes)
    lines = refused(budget, **STATES)
    assert lines[0].startswith("shard_states=True (")
    assert figure(lines[0]) <= budget
    shared_within = planned(gpu_memory=budget, shard_states=True, **STATES)
    assert 0.9 * figure(lines[0]) <= shared_within.memory.peak_bytes <= budget  # a margin is left


def test_both_where_neither_is_enough() -> None:
    options = {**STATES, "tokens": 2048}
    alone = min(
        planned(recompute="attention", **options).memory.peak_bytes,
        planned(recompute="none", shard_states=True, **options).memory.peak_bytes,
    )
    both = planned(recompute="layers", shard_states=True, **options).memory.peak_bytes
    budget = budget_for(round(1.1 * both))
    assert budget < 0.9 * alone
    lines = refused(budget, recompute="none", **options)
    assert lines[0].startswith('recompute="auto" with shard_states=True (')


def test_ranks_that_share_what_two_cannot_hold() -> None:
    (line,) = refused(parse_bytes("60MiB"), **{**STATES, "optimizer": 640})
    assert line.startswith("pass shard_states=True on 4 ranks or more, which divides them")
