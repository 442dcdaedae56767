"""Gathers of parameters begin early and sums of gradients end late, whatever the compiler."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import ringfx
from ringfx.comm import state_messages
from ringfx.comm.state_messages import begin_gather, begin_scatter, finish_gather, finish_scatter
from ringfx.compile.prefetch import overlap_states
from ringfx.passes.rewrite import parameters
from tests.models.wide import VOCABULARY, WideModel
from tests.support.harness import RankPool

aten = torch.ops.aten


def words(graph: Graph) -> list[str]:
    names = {
        begin_gather._opoverload: "begin", finish_gather._opoverload: "finish",
        begin_scatter._opoverload: "begin sum", finish_scatter._opoverload: "finish sum",
    }  # fmt: skip
    return [
        names.get(n.target, str(n.target).split(".")[1])
        for n in graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
    ]


def gathering(between: Any = None) -> Graph:
    """Three parameters, each joined, gathered and used; ``between``: made before the second."""
    graph = Graph()
    given = [graph.placeholder(f"p{i}") for i in range(3)]
    x = graph.placeholder("x")
    for i, rows in enumerate(given):
        flat = graph.call_function(aten.view.default, (rows, [-1]))
        if between is not None and i == 1:
            flat = graph.call_function(between, (flat, x))
        begun = graph.call_function(begin_gather._opoverload, (flat, 2, "", "p"))
        done = graph.call_function(finish_gather._opoverload, (begun, [1], []))
        x = graph.call_function(aten.mul.Tensor, (x, done))
    graph.output(x)
    return graph


def test_the_next_gather_begins_before_this_one_is_waited_for() -> None:
    graph = gathering()
    assert words(graph) == ["view", "begin", "finish", "mul"] * 3
    overlap_states(graph)
    graph.lint()
    assert words(graph) == [
        "view", "begin", "view", "begin", "finish", "mul", "view", "begin", "finish", "mul",
        "finish", "mul",
    ]  # fmt: skip
    begun = graph.find_nodes(op="call_function", target=begin_gather._opoverload)
    waits = graph.find_nodes(op="call_function", target=finish_gather._opoverload)
    assert [wait.args[2] for wait in waits] == [[begun[1]], [begun[2]], []]


def test_what_draws_random_numbers_stays_in_its_place() -> None:
    graph = gathering(aten.rand_like.default)
    for node in graph.find_nodes(op="call_function", target=aten.rand_like.default):
        node.args = node.args[:1]
    overlap_states(graph)
    graph.lint()
    assert words(graph)[:5] == ["view", "begin", "finish", "mul", "view"]


def summing(reads: bool) -> Graph:
    """Two gradients; ``reads``: the second is made of the first's sum."""
    graph = Graph()
    grads = [graph.placeholder(f"g{i}") for i in range(2)]
    sums: list[Node] = []
    for i, grad in enumerate(grads):
        made = graph.call_function(aten.mul.Tensor, (grad, sums[0] if reads and i else grad))
        begun = graph.call_function(begin_scatter._opoverload, (made, "", "g"))
        done = graph.call_function(finish_scatter._opoverload, (begun, made, []))
        sums.append(graph.call_function(aten.div.Tensor, (done, 2)))
    graph.output(tuple(sums))
    return graph


def test_a_sum_is_waited_for_after_the_next_has_begun() -> None:
    graph = summing(reads=False)
    overlap_states(graph)
    graph.lint()
    assert words(graph) == [
        "mul", "begin sum", "mul", "begin sum", "finish sum", "div", "finish sum", "div",
    ]  # fmt: skip


def test_a_sum_that_the_next_reads_is_waited_for_in_time() -> None:
    graph = summing(reads=True)
    before = words(graph)
    overlap_states(graph)
    assert words(graph) == before


def order(compiler: Any) -> tuple[list[str], list[str]]:
    """Beginnings and ends of messages in a forward, and in its backward."""
    events: list[str] = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(parameters, "SMALLEST_BUCKET", 1 << 10))
        for pending, what in ((state_messages._GATHERS, "gather"), (state_messages._SUMS, "sum")):
            for half in ("begin", "finish"):
                recorded = _recorded(getattr(pending, half), f"{half} {what}", events)
                patches.enter_context(patch.object(pending, half, recorded))
        return _order(compiler, events)


def _order(compiler: Any, events: list[str]) -> tuple[list[str], list[str]]:
    made = torch.Generator().manual_seed(1)
    given = [torch.randint(VOCABULARY, (2, 24), generator=made) for _ in range(2)]
    torch.manual_seed(0)
    split = ringfx.optimize(WideModel(), shard_states=True, compiler=compiler)
    loss: Tensor = split(*given)
    forward = [*events]
    events.clear()
    loss.backward()
    return forward, events


def _recorded(run: Any, text: str, events: list[str]) -> Any:
    def recorded(*args: Any) -> None:
        events.append(text)
        run(*args)

    return recorded


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_messages_are_under_way_while_a_model_computes(ranks2: RankPool, compiler: str) -> None:
    for forward, backward in ranks2.run(order, compiler):
        first = ["begin gather", "begin gather", "finish gather"]
        assert forward[:3] == first
        assert forward[-2:] == ["finish gather"] * 2
        assert forward.count("begin gather") == forward.count("finish gather") > 3
        gathers = [x for x in backward if x.endswith("gather")]
        assert gathers[:3] == first
        sums = [x for x in backward if x.endswith("sum")]
        assert sums[:3] == ["begin sum", "begin sum", "finish sum"]
        assert sums.count("begin sum") == sums.count("finish sum") == forward.count("begin gather")
        assert most_under_way(gathers) == most_under_way(sums) == 2


def most_under_way(events: list[str]) -> int:
    now, most = 0, 0
    for event in events:
        now += 1 if event.startswith("begin") else -1
        most = max(most, now)
    return most


def test_a_graph_without_states_stays_as_it_is() -> None:
    graph = GraphModule({}, Graph()).graph
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.mul.Tensor, (x, x)))
    overlap_states(graph)
    assert words(graph) == ["mul"]
