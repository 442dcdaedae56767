"""At 1,048,576 tokens: every kind of mask is recovered, and nothing near S x S is left or made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.ir.values import AttentionSite, Captured
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture
from ringfx.passes.detect import detect
from ringfx.passes.exprs import constants
from ringfx.passes.masks import recover
from tests.passes.masks.spellings import BATCH, HEADS, SPELLINGS
from tests.support.programs import Attend

LENGTH = 1 << 20
MIB = 1 << 20
LARGEST = 64 * MIB
GIVEN_WHOLE = {name for name in SPELLINGS if "matrix" in name or "buffer, sliced" in name}


def traced(name: str) -> Captured:
    """The program of one attention under the mask, on fake tensors."""
    mode = FakeTensorMode()
    with mode:
        inputs = [torch.empty(BATCH, HEADS, LENGTH, 1) for _ in range(3)]
        inputs += SPELLINGS[name].inputs(LENGTH, LENGTH)
        attend = Attend(SPELLINGS[name].mask)
        program = make_fx(lambda *args: (attend(*args),), pre_dispatch=True)(*inputs)
    return capture(program, inputs, known=find_rule)


@contextmanager
def watched() -> Iterator[list[int]]:
    """Bytes of every real value that is computed while planning."""
    made: list[int] = []
    compute = constants._compute

    def watch(node: Node, closure: list[Node]) -> Any:
        made.extend(bytes_of(n) for n in closure)
        return compute(node, closure)

    with mock.patch.object(constants, "_compute", watch):
        yield made


def bytes_of(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def made(program: Captured) -> list[Node]:
    nodes = program.graph_module.graph.nodes
    return [n for n in nodes if n.op == "call_function" and n.meta.get("val") is not None]


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n not in GIVEN_WHOLE])
def test_a_mask_of_a_million_tokens(name: str) -> None:
    program = traced(name)
    with watched() as computed:
        sites = recover(program, detect(program))
    assert not sites.declined, sites.declined
    site: AttentionSite = sites.found[0]
    assert max(computed, default=0) <= LARGEST
    for node in made(program):
        sizes = tuple(node.meta["val"].shape)
        assert sizes.count(LENGTH) < 2, f"{node.name} {sizes} is left"
        assert node.name == site.node or bytes_of(node) <= LARGEST, f"{node.name} {sizes}"
    if SPELLINGS[name].words:
        assert site.mask_words == SPELLINGS[name].words
