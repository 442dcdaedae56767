"""``torch.compile(backend="ringfx")``: as good as ``optimize``."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from ringfx.errors import InvalidArgument
from tests.end_to_end.models import plain, tokens
from tests.support.harness import RankPool

pytestmark = pytest.mark.ranks

LENGTH = 13
optimize = functools.partial(ringfx.optimize, compiler="eager")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"strateg": "simple"},
            "unknown option 'strateg'. Did you mean 'strategy'? Do: use one of mesh, ",
        ),
        ({"check_inputs": "no"}, 'check_inputs="no". Do: pass True, False'),
        ({"shard_states": True}, "backend='ringfx') cannot shard states"),
    ],
)
@pytest.mark.parametrize("suppressed", [False, True])
def test_an_error_of_the_backend_is_what_the_user_gets(
    options: dict[str, Any], words: str, suppressed: bool
) -> None:
    """Not inside one of Dynamo's, and not left out for an unsplit run."""
    torch._dynamo.reset()
    model = torch.compile(plain()(), backend="ringfx", options=options)
    with (
        torch._dynamo.config.patch(suppress_errors=suppressed),
        pytest.raises(InvalidArgument, match=re.escape(words)),
    ):
        model(tokens(LENGTH))


def many_lengths() -> list[str]:
    torch._dynamo.reset()
    model = torch.compile(plain()(), backend="ringfx", options={"compiler": "eager"})
    return [type(model(tokens(n))).__name__ for n in range(10, 22)]


def test_the_backend_splits_any_number_of_lengths(ranks2: RankPool) -> None:
    assert ranks2.run(many_lengths) == [["SplitTensor"] * 12] * 2


def a_marked_length(mark: bool) -> tuple[str, float]:
    torch._dynamo.reset()
    model = torch.compile(plain()(), backend="ringfx", options={"compiler": "eager"})
    given = tokens(LENGTH)
    if mark:
        torch._dynamo.mark_dynamic(given, 1)
    found = model(given)
    return type(found).__name__, found.double().square().sum().item()


def test_a_length_that_is_marked_as_dynamic_is_split_like_any(ranks2: RankPool) -> None:
    marked, unmarked = ranks2.run(a_marked_length, True), ranks2.run(a_marked_length, False)
    assert marked == unmarked
    assert marked[0][0] == "SplitTensor"


def _step(model: nn.Module, optimizer: Any) -> None:
    optimizer.step()


def _clipped_step(model: nn.Module, optimizer: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def _own_step(model: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1)


STEPS: dict[str, Callable[[nn.Module, Any], None]] = {
    "step": _step, "clip": _clipped_step, "own": _own_step
}  # fmt: skip


def whole_step(name: str) -> tuple[float, float]:
    """Loss, backward and the optimizer in one compiled function."""
    torch._dynamo.reset()
    stock = plain()()
    models = [stock, copy.deepcopy(stock)]
    losses: list[list[float]] = []
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def train(x: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> Any:
            loss = model(x, labels=x)[0]
            loss.backward()
            STEPS[name](model, optimizer)
            optimizer.zero_grad()
            return loss

        run: Any = train
        if compiled:
            run = torch.compile(train, backend="ringfx", options={"compiler": "eager"})
        losses.append([float(run(tokens(LENGTH, seed=s))) for s in range(3)])
    with torch.no_grad():
        pairs = zip(*(m.parameters() for m in models), strict=True)
        apart = max(float((a - b).abs().max()) for a, b in pairs)
    return max(abs(a - b) for a, b in zip(*losses, strict=True)), apart


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_training_step_may_be_compiled(ranks2: RankPool, name: str) -> None:
    for loss, apart in ranks2.run(whole_step, name):
        assert loss < 1e-5
        assert apart < 1e-5
