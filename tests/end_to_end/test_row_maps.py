"""Maps of whole rows of scores: each rank has the rows of its own queries, and is right."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.fx import Node

import ringfx
from ringfx.ir.plan import Plan
from ringfx.ir.values import CommKind
from tests.models.row_maps import COLUMNS, HIDDEN, ROWS, Across, Patches, RowMap
from tests.support.harness import RankPool, compare_all
from tests.support.named_cases import Made, named_cases
from tests.support.sampling import one_in
from tests.support.split_here import SplitHere, split_here

Tensor = torch.Tensor
WAYS = [(13, 3, ""), (12, 2, "full"), (13, 2, "causal"), (12, 3, "")]
"""Length, ranks, and the attention before: causal, each rank has two runs of the tokens."""
EVERY = "ringfx.every_token: every row of scores, a mask or a bias reads all of it"
SHARE = 0.55
"""Of one rank's memory that each of two may need."""


def inputs(length: int) -> tuple[Tensor]:
    return (torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length)),)


def split(name: str, number: int) -> tuple[SplitHere, int]:
    length, ranks, before = WAYS[number % len(WAYS)]
    return split_here(RowMap(name, before), inputs(length), ranks), length


def squares(found: SplitHere, length: int) -> list[str]:
    """Values of the local program that have all rows and all columns, but for what is given."""
    whole: list[str] = []
    given: set[Node] = set()
    for node in found.program.local.graph_module.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        if node.op == "placeholder" or given.issuperset(node.all_input_nodes or [node]):
            given.add(node)
        elif [*shape].count(length) > 1:
            whole.append(str(node))
    return whole


@pytest.mark.parametrize("name", ROWS)
def test_a_map_of_rows_is_equal_and_gathers_keys_and_values_alone(name: str) -> None:
    found, length = split(name, [*ROWS].index(name))
    assert found.worst < 1e-9
    assert squares(found, length) == []
    moved = found.program.plan.collectives
    size = 2 * length * HIDDEN * torch.float64.itemsize
    gathered = sum(m.bytes_moved for m in moved if m.kind.gathers and not m.in_backward)
    assert gathered == 2 * size
    scattered = sum(m.bytes_moved for m in moved if m.kind is CommKind.REDUCE_SCATTER)
    assert abs(scattered - gathered / found.ranks) < 8, "each rank has its part of their gradients"
    assert found.program.plan.by_rows
    assert found.program.plan.declined == found.program.plan.missed == ()


@pytest.mark.parametrize("name", ["talking_heads", "top_k", "convit", "sigmoid"])
def test_a_map_of_rows_of_patches_is_split_at_rows_of_patches(name: str) -> None:
    for high, ranks, before in ((16, 2, "full"), (12, 2, ""), (24, 3, "")):
        image = torch.randn(2, 3, high, 8, generator=torch.Generator().manual_seed(high))
        found = split_here(Patches(name, before), [image], ranks)
        assert found.worst < 1e-9, (high, ranks)
        assert found.program.plan.by_rows
        assert found.whole == []
        assert set(found.gathered) == {EVERY}


@pytest.mark.parametrize("name", COLUMNS)
def test_what_reads_columns_too_is_equal(name: str) -> None:
    found, length = split(name, [*COLUMNS].index(name))
    assert found.worst < 1e-9
    whole = 2 * 2 * length * length * torch.float64.itemsize
    gathers = [m for m in found.program.plan.collectives if m.kind is CommKind.ALL_GATHER]
    matrices = [m.reason for m in gathers if m.bytes_moved == whole and not m.in_backward]
    assert matrices == ([EVERY] if name in ("symmetric", "two_steps") else [])


@pytest.mark.parametrize("name", ["top_k", "top_k_scattered", "one_more", "weights_returned"])
def test_few_rows_are_split_by_columns_which_the_plan_says(name: str) -> None:
    number = [*ROWS].index(name)
    ranks, before = 2 + number % 2, ("", "full")[number % 2]
    (few,), (many,) = inputs(13), inputs(40)
    found = split_here(Across(name, before), (few, many), ranks, strict=True)
    assert found.worst < 1e-9
    (entry,) = found.program.plan.by_columns
    whose = "the columns of its own keys of its weights [2, 2, 13, 40]"
    assert f"; each rank has {whose}, " in entry.reason
    assert "1 by columns of scores" in found.program.plan.found_words


def made(name: str, i: int) -> Made:
    model = functools.partial(RowMap, name, WAYS[i % len(WAYS)][2])
    return model, functools.partial(inputs, 13 + i % 2)


@pytest.mark.slow  # on three ranks below
def test_maps_of_rows_are_equal_on_two_ranks(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, named_cases([*ROWS, *COLUMNS], 4, made)):
        comparison.check()


def test_maps_of_rows_are_equal_on_three_ranks(ranks3: RankPool) -> None:
    for comparison in compare_all(ranks3, named_cases([*ROWS, *COLUMNS][1:], 8, made)):
        comparison.check()


def planned(name: str, length: int, ranks: int) -> Plan:
    return ringfx.plan(RowMap(name), (torch.randn(1, length, HIDDEN),), world_size=ranks)


@pytest.mark.parametrize("name", one_in(4, ROWS))
def test_two_ranks_hold_half_of_the_rows_each(name: str) -> None:
    one, two = (planned(name, 8192, ranks).memory.peak_bytes for ranks in (1, 2))
    assert two <= SHARE * one


def test_a_plan_says_which_attention_is_by_rows() -> None:
    one, two = (planned("top_k", 64, ranks) for ranks in (1, 2))
    assert one.found_words == two.found_words == "attention: 0/1 found, 1 by rows of scores"
    why = "its weights have other users (topk), so they must exist as a matrix; each rank has "
    (entry,) = one.by_rows
    assert entry.reason == (
        f"{why}all rows of its weights [1, 2, 64, 64], 32.0 KiB, and all of its keys and values"
    )
    (entry,) = two.by_rows
    assert entry.reason == (
        f"{why}the rows of its own queries of its weights [1, 2, 64, 64], 16.0 KiB, and all of its "
        "keys and values"
    )
    assert "attention by rows of scores\n  qkv (" in str(two)
    assert Plan.from_json(two.to_json()) == two
