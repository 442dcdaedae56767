"""Repeated layers are decided once, and as they would be one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from types import SimpleNamespace

import networkx as nx
import pytest
import torch
from torch import nn
from torch.fx import Graph, Node

from ringfx.passes.place import min_cut, repeated_layers
from tests.models import hugging_face, shapes
from tests.support.programs import lowered

ODD = 5
"""The layer that looks at its tokens in the opposite order, which needs them all."""


class Stack(nn.Module):
    """Equal blocks, of which one may be unlike the others."""

    def __init__(self, layers: int, odd: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(shapes.VOCAB, shapes.HIDDEN)
        self.blocks = nn.ModuleList(shapes.Block() for _ in range(layers))
        self.odd = odd

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, is_causal=True)
            if i == self.odd:
                x = x + x.flip(1)
        return x  # type: ignore[no-any-return]


def ids() -> torch.Tensor:
    return torch.zeros(2, 11, dtype=torch.int64)


def one_by_one(graph: Graph, describe: Callable[[Node], Hashable]) -> Mapping[Node, str]:
    return {n: n.name for n in graph.nodes}


def decided(model: Callable[..., object]) -> list[tuple[str, str]]:
    program = lowered(model, ids())
    modes = [(n.name, repr(m)) for n, m in program.local.placement.modes.items()]
    return modes + [(m.node, m.kind) for m in program.plan.collectives]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Stack, 8),
        functools.partial(Stack, 9, ODD),
        functools.partial(Stack, 9, 0),
        functools.partial(hugging_face.llama, num_hidden_layers=8),
    ],
    ids=["equal", "one is odd", "the first is odd", "llama"],
)
def test_layers_decided_together_are_decided_as_one_by_one(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    costs: list[int] = []

    def minimum_cut(*args: object) -> tuple[int, object]:
        result: tuple[int, object] = nx.minimum_cut(*args)
        costs.append(result[0])
        return result

    monkeypatch.setattr(min_cut, "nx", SimpleNamespace(DiGraph=nx.DiGraph, minimum_cut=minimum_cut))
    together = decided(model)
    monkeypatch.setattr(min_cut, "alike", one_by_one)
    assert together == decided(model)
    assert costs[0] == costs[1]


def decisions(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    found: list[int] = []

    def counted(graph: Graph, describe: Callable[[Node], Hashable]) -> Mapping[Node, str]:
        result = repeated_layers.alike(graph, describe)
        found.append(len(set(result.values())))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(min_cut, "alike", counted)
        lowered(Stack(layers), ids())
    return found[0]


def test_more_layers_need_no_more_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decisions(8, monkeypatch) == decisions(24, monkeypatch)
