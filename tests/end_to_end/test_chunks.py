"""Models whose wide parts run in chunks give the unsplit model's results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import ringfx
from tests.models.wide import LOSSES, VOCABULARY, WideModel
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in


def inputs(seq_len: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(VOCABULARY, (2, seq_len), generator=made) for _ in range(2))
    return {"tokens": tokens, "labels": labels}


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def touched(output: Any) -> Tensor:
    """A loss that reads the logits as well."""
    loss, logits = output
    weights = torch.linspace(0, 1, logits.shape[1], dtype=logits.dtype)[:, None]
    return loss + (logits * weights).square().mean() + logits[:, -1].sum()  # type: ignore[no-any-return]


def case(loss: str, seq_len: int, compiler: str = "eager", **model: bool) -> Case:
    returns = model.get("returns_logits", False)
    return Case(
        model=functools.partial(WideModel, loss, **model),
        inputs=functools.partial(inputs, seq_len),
        loss=touched if returns else loss_of,
        dtype=torch.float64,
        options={"compiler": compiler, "chunks": 4},
        label=f"{loss}, {seq_len} tokens, {compiler}",
    )


@pytest.mark.parametrize("seq_len", one_in(2, [61, 24]))
def test_every_loss_is_right_on_two_ranks(ranks2: RankPool, seq_len: int) -> None:
    for found in compare_all(ranks2, [case(loss, seq_len) for loss in one_in(2, LOSSES)]):
        found.check()


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [9, 62])
def test_every_loss_is_right_on_three_ranks(ranks3: RankPool, seq_len: int) -> None:
    for found in compare_all(ranks3, [case(loss, seq_len) for loss in LOSSES]):
        found.check()


def test_traced_by_autograd_they_are_right_on_three_ranks(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, [case("z-loss", 61, "aot_eager")]):
        found.check()


@pytest.mark.slow  # the quick one is test_llama.py's
@pytest.mark.inductor
def test_compiled_bodies_are_right(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, [case("hugging face", 62, "inductor")]):
        found.check()


def test_logits_that_are_touched_are_right(ranks2: RankPool) -> None:
    cases = [
        case("hugging face", 61, returns_logits=True),
        case("summed", 24, "aot_eager", returns_logits=True, tied=True),
        case("z-loss", 23, returns_logits=True),
    ]
    for found in compare_all(ranks2, cases):
        found.check()


def written_before_they_are_touched(cast: bool) -> tuple[str, str]:
    """``cast``: first to another type, which defers them again."""
    model = WideModel(returns_logits=True)
    split = ringfx.optimize(model, chunks=4, compiler="eager")
    with torch.no_grad():
        _, logits = split(**inputs(24))
        model.head.weight.mul_(2)
        try:
            (logits.double() if cast else logits).sum()
        except ringfx.errors.DeferredLost as error:
            return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("cast", [False, True])
def test_logits_whose_weights_have_changed_are_an_error(ranks2: RankPool, cast: bool) -> None:
    for kind, text in ranks2.run(written_before_they_are_touched, cast):
        assert kind == "DeferredLost"
        assert "written before" in text
        assert 'chunks="none"' in text


def narrow_weights() -> list[float]:
    """Gradients of bfloat16 weights, of all chunks at once and of many."""
    found = []
    for chunks in ("none", 4):
        model = WideModel("summed").to(torch.bfloat16)
        given = inputs(256)
        ringfx.optimize(model, chunks=chunks, compiler="eager")(**given).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append({n: g.float() for n, g in grads.items() if g is not None})
    exact = WideModel("summed").to(torch.bfloat16).double()
    exact(**inputs(256)).backward()
    expected = {n: p.grad for n, p in exact.named_parameters()}
    return [
        max(((f[n] - g).norm() / g.norm()).item() for n, g in expected.items() if g is not None)
        for f in found
    ]


def test_gradients_of_narrow_weights_are_summed_in_float32(ranks2: RankPool) -> None:
    """Of 32 chunks each: summed in bfloat16 they would be several times as far away."""
    for at_once, in_chunks in ranks2.run(narrow_weights):
        assert in_chunks < 1.5 * at_once
