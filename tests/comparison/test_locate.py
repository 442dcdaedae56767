"""The first difference among values of a split run, which are made here by hand."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from ringfx.comparison.locate import Located, Value, locate
from ringfx.comparison.points import Recorded, record
from tests.comparison.models import Decoder, ids


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    torch.manual_seed(0)
    return record(Decoder(layers=2).double(), (ids(),), {}, None)


def located(
    recorded: Recorded,
    *,
    without: Collection[str] = (),
    halved: Collection[str] = (),
    wrong: Collection[str] = (),
) -> Located | None:
    """Without the values, or with half the gradients, that these modules gave."""
    values = [
        Value(value=p.value, grad=p.grad / 2 if set(p.given_by) & set(halved) else p.grad)
        for p in recorded.points
        if p.grad is not None and not set(p.given_by) & set(without)
    ]
    return locate(recorded, values, wrong, 1e-9)


def given(recorded: Recorded) -> list[str]:
    return [event.module for event in recorded.forward if event.kind == "gives"]


def test_equal_values_differ_nowhere(recorded: Recorded) -> None:
    assert located(recorded) is None


def test_a_result_and_all_after_it(recorded: Recorded) -> None:
    modules = given(recorded)
    found = located(recorded, without=modules[modules.index("layers.1.mlp.1") :])
    assert found is not None
    assert (found.layer, found.what) == ("layers.1.mlp.1", "its output")


def test_a_module_that_was_only_rewritten_is_none(recorded: Recorded) -> None:
    assert located(recorded, without=["layers.1.mlp.1"]) is None


def test_a_modules_own_code_between_its_parts(recorded: Recorded) -> None:
    """Attention is a function of the layer: ``out`` takes something else, and gives it."""
    modules = given(recorded)
    after = modules[modules.index("layers.0.out") :]
    functions = [p.value for p in recorded.points if not p.given_by and p.trains]
    values = [
        Value(value=p.value, grad=p.grad)
        for p in recorded.points
        if not set(p.given_by) & set(after) and not any(p.value is x for x in functions)
    ]
    found = locate(recorded, values, (), 1e-9)
    assert found is not None
    assert (found.layer, found.what) == ("layers.0", "what it hands to out")


def test_the_first_gradient_in_backward(recorded: Recorded) -> None:
    """That of what a module takes, of what a layer's own code takes, and of a parameter."""
    found = located(recorded, halved=["layers.1.mlp.0", "layers.1.qkv", "layers.0.mlp.0", "embed"])
    assert found is not None
    assert (found.layer, found.what) == ("layers.1.mlp.1", "the gradient of its input")
    found = located(recorded, halved=["layers.1.qkv", "layers.0.mlp.0", "embed"])
    assert found is not None
    assert (found.layer, found.what) == ("layers.1", "the gradient of what qkv gives it")
    found = located(recorded, wrong=["layers.0.norm.weight", "layers.1.out.bias"])
    assert found is not None
    assert (found.layer, found.what) == ("layers.1.out", "the gradient of its bias")
