"""What cannot be split says so, with the reason."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from tests.end_to_end.models import plain, tokens
from tests.support.harness import RankPool

pytestmark = pytest.mark.ranks

LENGTH = 13
optimize = functools.partial(ringfx.optimize, compiler="eager")


@contextmanager
def said() -> Iterator[list[str]]:
    """What ringfx warns of inside."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfx").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("ringfx").removeHandler(handler)


def under_a_stance() -> tuple[str, list[str]]:
    model = optimize(plain()())
    with said() as texts, torch.compiler.set_stance("force_eager"):
        out = model(tokens(LENGTH))
        model(tokens(LENGTH))
    return type(out).__name__, texts


def test_a_stance_is_named(ranks2: RankPool) -> None:
    for kind, texts in ranks2.run(under_a_stance):
        assert kind == "Tensor"
        assert len(texts) == 1
        assert "ran unsharded on every rank: torch.compiler.set_stance('force_eager')" in texts[0]


class Recurrent(nn.Module):
    """Dynamo gives up the code that reads the LSTM, and with it the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.qkv = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.lstm(x)[0])[:, None].chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def of_recurrent() -> list[str]:
    model = optimize(Recurrent())
    with said() as texts:
        for _ in range(2):
            model(torch.randn(1, LENGTH, 8))
    return texts


def test_code_that_dynamo_gives_up_is_named_with_its_reason(ranks2: RankPool) -> None:
    for texts in ranks2.run(of_recurrent):
        assert len(texts) == 1
        assert "Dynamo does not support RNN, GRU, or LSTM). Do: put" in texts[0]


def in_a_transform() -> list[str]:
    model = optimize(plain()())
    parameters = dict(model.named_parameters())

    def loss(p: Any) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, p, (tokens(LENGTH),))
        return out.sum()

    with said() as texts:
        torch.func.grad(loss)(parameters)
    return texts


def test_a_transform_is_named(ranks2: RankPool) -> None:
    for texts in ranks2.run(in_a_transform):
        assert [t for t in texts if "inside a torch.func transform" in t]


def compiled_too() -> list[str]:
    with said() as texts:
        model: Any = optimize(plain()())
        model.compile()
        model(tokens(LENGTH))
    return texts


def test_compiling_again_is_said_to_have_no_effect(ranks2: RankPool) -> None:
    for texts in ranks2.run(compiled_too):
        assert [t for t in texts if t.startswith("model.compile() has no effect")]
