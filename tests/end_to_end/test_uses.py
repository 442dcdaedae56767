"""What people do with a model beside training it: save it, copy it, differentiate it twice."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import ringfx
from ringfx.compile.settings import Compiler
from ringfx.errors import VerificationError
from tests.end_to_end.models import plain, tokens
from tests.support.harness import Case, RankPool, compare_all, raises
from tests.support.sampling import one_in


def twice(compiler: Compiler) -> None:
    """A gradient penalty on the parameters."""
    model = ringfx.optimize(plain()(), compiler=compiler)
    loss = model(tokens(13), labels=tokens(13))[0]
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("compiler", one_in(2, ["eager", "aot_eager"]))
def test_second_derivatives_are_refused_by_name(ranks2: RankPool, compiler: Compiler) -> None:
    for text in raises(ranks2, twice, compiler):
        assert text.startswith("RingfxError: second derivatives are not supported")
        assert "Do: compute them with the original model" in text


def recorded_but_not_used(compiler: Compiler) -> float:
    """``create_graph=True`` alone is no second derivative."""
    stock = plain()()
    model = ringfx.optimize(copy.deepcopy(stock), compiler=compiler)
    for one in (model, stock):
        one(tokens(13), labels=tokens(13))[0].backward(create_graph=True)
    pairs = zip(model.parameters(), stock.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max()) for a, b in pairs)  # type: ignore[operator]


@pytest.mark.parametrize("compiler", one_in(2, ["eager", "aot_eager"]))
def test_first_derivatives_may_be_recorded(ranks2: RankPool, compiler: Compiler) -> None:
    assert max(ranks2.run(recorded_but_not_used, compiler)) < 1e-5


def saved_and_loaded() -> tuple[str, bool, float, list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfx").addHandler(handler)
    model = ringfx.optimize(plain()(), compiler="eager")
    model(tokens(13), labels=tokens(13))[0].backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = plain()()(tokens(13))
        worst = max(float((m(tokens(13)) - expected).abs().max()) for m in (loaded, again))
    logging.getLogger("ringfx").removeHandler(handler)
    return type(loaded).__name__, isinstance(loaded, ringfx.api.Optimized), worst, said


def test_a_saved_model_loads_as_the_model_that_was_given(ranks2: RankPool) -> None:
    for name, optimized, worst, said in ranks2.run(saved_and_loaded):
        assert name == "PlainTransformer"
        assert not optimized
        assert worst == 0.0
        assert sum("pickled as the model that was given" in text for text in said) == 1


def copied() -> list[int]:
    model = ringfx.optimize(plain()(), compiler="eager")
    copies: list[Any] = [copy.deepcopy(model), copy.copy(model)]
    with torch.no_grad():
        for one in copies:
            one(tokens(13))
    return [len(one.plan.layers) for one in copies]


def test_copies_of_an_optimized_model_are_split(ranks2: RankPool) -> None:
    assert ranks2.run(copied) == [[2, 2]] * 2


class EmptyParameters(nn.Module):
    """Prompts of length zero, and an adapter of width zero."""

    def __init__(self) -> None:
        super().__init__()
        self.model = plain()()
        self.prompt = nn.Parameter(torch.zeros(0))
        self.adapter = nn.Linear(96, 0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.model(input_ids)
        return torch.cat([x, self.adapter(x)], -1) + self.prompt.sum()


def some_tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(13, 2)}


def no_batch() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(13, 0)}


def test_parameters_and_batches_of_no_elements(ranks2: RankPool) -> None:
    options = {"compiler": "eager"}
    cases = [
        Case(model=EmptyParameters, inputs=some_tokens, loss=torch.sum, options=options),
        Case(model=plain(), inputs=no_batch, loss=torch.sum, options=options),
    ]
    for found in compare_all(ranks2, cases):
        found.check(outputs=1e-5)


def a_defect() -> None:
    def lower(*args: Any) -> Any:
        raise KeyError("something of ours")

    with mock.patch("ringfx.compile.backend.lower", lower):
        ringfx.optimize(plain()(), compiler="eager")(tokens(13))


def test_a_defect_says_that_it_is_one(ranks2: RankPool) -> None:
    for text in raises(ranks2, a_defect):
        assert text.startswith(f"{VerificationError.__name__}: ringfx could not rewrite")
        assert "KeyError ('something of ours')" in text
        assert "test_uses.py" in text or "lower" in text
