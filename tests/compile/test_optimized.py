"""An optimized model is the user's model: its class and parts; no graph outlives a step."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import ringfx
from tests.end_to_end.models import llama, plain, tokens
from tests.support.harness import RankPool

LENGTH = 13
optimize = functools.partial(ringfx.optimize, compiler="eager")


def test_the_class_of_an_optimized_model_builds_plain_models() -> None:
    model: Any = optimize(llama()())
    made = type(model)(model.config)
    assert type(made).__name__ == "LlamaForCausalLM"
    assert not isinstance(made, ringfx.api.Optimized)
    assert made(input_ids=tokens(LENGTH)).logits.shape == (1, LENGTH, 96)
    again = type(model)._from_config(model.config)
    assert not isinstance(again, ringfx.api.Optimized)


def test_setting_a_part_keeps_the_part_itself() -> None:
    model: Any = optimize(llama()())
    inner = model._modules["model"]
    model.model = model.model
    assert model._modules["model"] is inner


_ALIVE = [0]


class _Box:
    """What autograd keeps of a saved tensor, counted."""

    def __init__(self, x: torch.Tensor) -> None:
        _ALIVE[0] += 1
        self.x = x.detach()

    def __del__(self) -> None:
        _ALIVE[0] -= 1


def _saved_after(model: nn.Module, use: Callable[[torch.Tensor], Any]) -> tuple[int, int]:
    gc.collect()
    gc.disable()
    try:
        before = _ALIVE[0]
        with torch.autograd.graph.saved_tensors_hooks(_Box, lambda box: box.x):
            out = model(tokens(LENGTH))
            peak = _ALIVE[0] - before
            use(out)
        del out
        return peak, _ALIVE[0] - before
    finally:
        gc.enable()


USES: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda out: None,
    lambda out: out[:, -1].sum(),
    lambda out: F.cross_entropy(out[0], tokens(LENGTH)[0]),
    lambda out: out.square().mean().backward(),
)


def what_is_left() -> list[tuple[int, int]]:
    model = optimize(plain()())
    model(tokens(LENGTH)).sum()
    return [_saved_after(model, use) for use in USES]


def test_no_circle_of_references_keeps_a_steps_graph(ranks2: RankPool) -> None:
    for found in ranks2.run(what_is_left):
        assert all(peak > 10 and left == 0 for peak, left in found), found
