"""Dropout of attention weights: found in every spelling; what is another is declined by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ringfx.ir.values import Captured
from ringfx.passes.detect import prove
from tests.passes.detect.spellings_dropout import DROPPING, DROPPING_DECOYS, P
from tests.passes.detect.spellings_eager import Weights, weighed
from tests.passes.detect.test_eager import given, weights
from tests.support.direct import canonical, program_of

Tensor = torch.Tensor
RUNS = 120


def dropping(body: Callable[..., Any]) -> tuple[Captured, list[Tensor]]:
    """The program of a spelling; its outputs are a tuple, as Dynamo has them."""

    def outputs(w: Weights, x: Tensor) -> Sequence[Tensor]:
        found = body(w, x)
        return (found,) if isinstance(found, Tensor) else found

    return program_of(weights(outputs), given("x"))


def moments(program: Captured, values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each element of the output over runs in a row."""
    torch.manual_seed(0)
    run = torch.fx.Interpreter(program.graph_module).run
    with torch.no_grad():
        outputs = torch.stack([run(*values)[0] for _ in range(RUNS)])
    return outputs.mean(0), outputs.var(0)


@pytest.mark.parametrize("name", DROPPING)
def test_a_spelling_is_found_and_drops_as_many(name: str) -> None:
    program, values = dropping(DROPPING[name])
    mean, variance = moments(program, values)
    sites = canonical(program)
    assert [math.isclose(s.spec.dropout, P) for s in sites.found] == [True], sites.declined
    graph = program.graph_module.graph
    drawing = [
        str(n.target) for n in graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
    ]  # fmt: skip
    assert drawing == ["aten.randint.low"]
    assert not any("softmax" in str(n.target) or "exp." in str(n.target) for n in graph.nodes)
    ours, our_variance = moments(program, values)
    distance = (ours - mean) / ((variance + our_variance) / RUNS).sqrt().clamp(min=1e-12)
    assert float(distance.abs().max()) < 5.0, "standard errors"
    assert float(distance.square().mean()) < 1.8
    assert 0.8 < float(our_variance.sum() / variance.sum()) < 1.25


@pytest.mark.parametrize("name", ["a function", "filled", "grouped", "exponentials"])
def test_the_proof_sees_which_weights_are_dropped(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As written nothing is dropped now, and the canonical form drops."""
    monkeypatch.setattr(prove._Trial, "_dropped", lambda _, weights, dims: weights)
    sites = canonical(dropping(DROPPING[name])[0])
    assert sites.found == ()
    assert "differs from it by" in sites.declined[0].reason


def test_in_evaluation_nothing_is_drawn() -> None:
    program, _ = dropping(weighed(lambda s: F.dropout(s.softmax(-1), P, training=False)))
    (site,) = canonical(program).found
    assert site.spec.dropout == 0.0
    assert not [n for n in program.graph_module.graph.nodes if "rand" in str(n.target)]


@pytest.mark.parametrize("name", DROPPING_DECOYS)
def test_a_decoy_is_declined_by_name(name: str) -> None:
    body, reason = DROPPING_DECOYS[name]
    program, values = dropping(body)
    run = torch.fx.Interpreter(program.graph_module).run
    torch.manual_seed(1)
    before = run(*values)
    sites = canonical(program)
    assert sites.found == ()
    assert any(reason in near.reason for near in sites.declined), sites.declined
    torch.manual_seed(1)
    after = run(*values)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
