"""Values that wait in the host's memory for backward give the unsplit model's results."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx import Graph, Node

import ringfx
from ringfx.compile import compilers
from ringfx.compile.prefetch import overlap_states
from ringfx.ir.plan import Plan
from tests.end_to_end.test_chunks import inputs, loss_of
from tests.end_to_end.test_recompute import case as recomputed
from tests.models.wide import WideModel
from tests.support.harness import RankPool, compare_all

case = functools.partial(recomputed, offload="all")


EVERY: tuple[dict[str, Any], ...] = (
    {}, {"chunks": 4}, {"strategy": "ulysses", "recompute": "attention"},
    {"strategy": "collective", "chunks": "none"},
)  # fmt: skip


def test_on_two_ranks(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, [case(61, **options) for options in EVERY]):
        found.check()


@pytest.mark.slow
def test_on_three_ranks(ranks3: RankPool) -> None:
    for found in compare_all(
        ranks3, [case(62, **options) for options in EVERY if "ulysses" not in options.values()]
    ):
        found.check()


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_by_inductor(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, [case(61, "inductor"), case(61, "inductor", chunks=4)]):
        found.check()


@dataclass(frozen=True, kw_only=True)
class Moves:
    """What the compiled programs of a step do."""

    sent: int
    """Values that forward sends to the host."""
    fetched: int
    """Those that backward fetches."""
    sent_bytes: int
    kept_bytes: int
    """What forward keeps on the device."""
    plan: Plan


def moves_of_a_step(options: dict[str, Any]) -> Moves:
    found: list[list[Node]] = []

    def seen(graph: Graph) -> None:
        found.append(list(graph.nodes))
        overlap_states(graph)

    with mock.patch.object(compilers, "overlap_states", seen):
        split = ringfx.optimize(WideModel(), compiler="aot_eager", **options)
        loss_of(split(**inputs(61))).backward()
    moves = [[n for n in nodes if n.target is DEVICE_PUT] for nodes in found]
    made = [n for n in set(found[0][-1].all_input_nodes) if n.op != "placeholder"]
    return Moves(
        sent=len(moves[0]), fetched=len(moves[1]), sent_bytes=num_bytes(moves[0]),
        kept_bytes=num_bytes(n for n in made if n.target is not DEVICE_PUT),
        plan=getattr(split, "plan"),  # noqa: B009
    )  # fmt: skip


DEVICE_PUT = torch.ops.prims.device_put.default


def num_bytes(nodes: Iterable[Node]) -> int:
    return sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in nodes)


@pytest.mark.parametrize("how", ["layers", "attention"])
def test_what_the_plan_says_is_sent_and_fetched(ranks2: RankPool, how: str) -> None:
    kept, moved = (
        ranks2.run(moves_of_a_step, {"recompute": how, "offload": offload})[0]
        for offload in ("none", "all")
    )
    keeps_output = how == "layers"
    # Hidden states between layers, and attention's output where it is kept.
    between = [True] * (len(moved.plan.layers) - 1) + [False]
    assert [x.offloaded for x in moved.plan.layers] == [x or keeps_output for x in between]
    assert moved.sent == moved.fetched == sum(between) + keeps_output * len(between)
    planned = sum(x.host_bytes for x in moved.plan.layers)
    assert planned <= moved.sent_bytes <= 1.1 * planned  # 64 tokens with padding
    assert moved.kept_bytes == kept.kept_bytes - moved.sent_bytes
    assert kept.sent == kept.fetched == 0
