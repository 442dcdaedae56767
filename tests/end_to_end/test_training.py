"""A training loop around an optimized model stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from tests.end_to_end.models import llama, tokens
from tests.support.harness import RankPool, gradient_differences

GRADIENTS = 1e-4
SEQ_LEN = 31


def pair(**sizes: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A stock model, an equal one, and the latter optimized."""
    stock, source = llama(**sizes)(), llama(**sizes)()
    return stock, source, ringfx.optimize(source, compiler="eager")


def loss_of(model: Callable[..., Any], seed: int = 3) -> torch.Tensor:
    drawn = tokens(SEQ_LEN, 2, seed=seed)
    result: torch.Tensor = model(input_ids=drawn, labels=drawn).loss
    return result


def difference(ours: nn.Module, stock: nn.Module) -> float:
    """The worst relative difference of any parameter's gradient."""
    found = {name: p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in stock.named_parameters()}
    return max(gradient_differences(found, expected).values())


def accumulating_gradients() -> float:
    stock, source, model = pair()
    for seed in range(3):
        loss_of(stock, seed).backward()
        loss_of(model, seed).backward()
    return difference(source, stock)


def switching_modes() -> float:
    """Training, evaluation and inference in turn; each is compiled for itself."""
    stock, source, model = pair()
    worst = 0.0
    for training, grad in ((True, True), (False, True), (False, False), (True, True)):
        model.train(training)
        assert model.training is training
        model.zero_grad()
        stock.zero_grad()
        with torch.set_grad_enabled(grad):
            ours, expected = loss_of(model), loss_of(stock)
        worst = max(worst, float((ours - expected).abs().detach()))
        if grad:
            ours.backward()
            expected.backward()
            worst = max(worst, difference(source, stock))
    return worst


def with_frozen_parameters() -> float:
    stock, source, model = pair()
    for owner in (stock, source):
        for name, parameter in owner.named_parameters():
            parameter.requires_grad_("q_proj" in name)
    loss_of(stock).backward()
    loss_of(model).backward()
    assert source.get_parameter("lm_head.weight").grad is None
    return difference(source, stock)


def loss_with_a_penalty_on_logits() -> float:
    """The logits are read outside the model and take part in the gradient."""
    stock, source, model = pair()
    drawn = tokens(SEQ_LEN, 2)
    for called in (stock, model):
        output = called(input_ids=drawn, labels=drawn)
        (output.loss + 0.1 * output.logits.square().mean()).backward()
    return difference(source, stock)


def with_gradient_checkpointing() -> float:
    stock, source, _ = pair()
    source.gradient_checkpointing_enable()  # type: ignore[operator]
    source.train()
    loss_of(stock).backward()
    loss_of(ringfx.optimize(source, compiler="aot_eager")).backward()
    return difference(source, stock)


def as_a_dynamo_backend() -> float:
    stock, source, _ = pair()
    loss_of(stock).backward()
    loss_of(torch.compile(source, backend="ringfx", options={"compiler": "eager"})).backward()
    return difference(source, stock)


@pytest.mark.parametrize(
    "function",
    [
        accumulating_gradients,
        pytest.param(switching_modes, marks=pytest.mark.slow),
        with_frozen_parameters,
        loss_with_a_penalty_on_logits,
        with_gradient_checkpointing,
        as_a_dynamo_backend,
    ],
    ids=lambda function: function.__name__,
)
def test_gradients_agree_when(ranks2: RankPool, function: Callable[[], float]) -> None:
    assert max(ranks2.run(function)) <= GRADIENTS


def weights_after_training() -> tuple[float, list[str], bool]:
    stock, source, model = pair()
    for called in (stock, model):
        optimizer = torch.optim.SGD(called.parameters(), lr=0.1, momentum=0.9)
        for seed in range(5):
            optimizer.zero_grad()
            loss_of(called, seed).backward()
            optimizer.step()
    pairs = zip(source.parameters(), stock.parameters(), strict=True)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return worst, sorted(model.state_dict()), isinstance(model, type(stock))


def test_weights_agree_after_some_steps_and_keep_their_names(ranks2: RankPool) -> None:
    names = sorted(llama()().state_dict())
    for worst, found, is_llama in ranks2.run(weights_after_training):
        assert worst < 1e-4
        assert found == names
        assert is_llama
