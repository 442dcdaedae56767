"""Mixed precision in every way in which it is used: as near to float64 as the unsplit model.

The bound is that of ``tests/end_to_end/mixed.py``: outputs, loss and every gradient within twice
the distance of the unsplit model under the same recipe, on every rank.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringfx
from tests.end_to_end import mixed
from tests.end_to_end.mixed import Mixed, ambient, check, leave_as_is
from tests.end_to_end.mixed_models import (
    CORES,
    LAYERS,
    Decorated,
    Disabled,
    FullAttention,
    Inside,
    Layers,
    MultiHead,
    inputs,
    layers,
)
from tests.end_to_end.models import llama, with_ignored_labels
from tests.support.harness import RankPool
from tests.support.sampling import one_in

BF16, F16 = torch.bfloat16, torch.float16


def case(model: Any, recipe: Any, label: str, compiler: str = "eager", **more: Any) -> Mixed:
    given: dict[str, Any] = {"sites": LAYERS, "inputs": inputs()} | more
    options = {"compiler": compiler} | given.pop("options", {})
    return Mixed(model=model, recipe=recipe, options=options, label=f"{label}, {compiler}", **given)


def spellings() -> list[Mixed]:
    """Under autocast queries and keys are float32 (rotary) and values bfloat16."""
    recipes = {name: mixed.forward_alone if name == "flex" else ambient for name in CORES}
    return [case(layers(name), recipe, name) for name, recipe in recipes.items()]


def of_short_weights() -> list[Mixed]:
    """Weights in bfloat16; norms, rotary and some softmaxes in float32; no autocast."""
    return [
        case(layers(name, narrow_operands=True), leave_as_is, f"{name}, bfloat16", weights=BF16)
        for name in CORES
        if name != "flex"
    ]


def recipes() -> list[Mixed]:
    found = [
        case(layers("sdpa"), recipe, recipe.__name__, compiler)
        for recipe in (mixed.by_state, mixed.backward_inside, mixed.converted)
        for compiler in ("eager", "aot_eager")
    ]
    short = [case(layers(core), mixed.in_float16, core, eps=2**-10) for core in ("sdpa", "einsum")]
    return [*found, *short, case(layers("sdpa"), ambient, "plain", "inductor")]


def regions() -> list[Mixed]:
    """Entered by the model: around its body, as a decorator, off for a part and on again in it."""
    pairs: list[tuple[type[Layers], Any]] = [
        (Inside, leave_as_is), (Inside, ambient), (Decorated, leave_as_is),
        (Disabled, ambient), (FullAttention, ambient),
    ]  # fmt: skip
    return [
        case(layers(core, model=model), recipe, f"{model.__name__} {recipe.__name__} {core}")
        for model, recipe in pairs
        for core in ("sdpa", "wide_softmax")
    ]


def checkpoints() -> list[Mixed]:
    pairs = (("reentrant", "eager"), ("nonreentrant", "eager"), ("nonreentrant", "aot_eager"))
    return [case(layers("sdpa", kind), ambient, kind, compiler) for kind, compiler in pairs]


def torch_layers() -> list[Mixed]:
    return [
        case(MultiHead, ambient, "nn.MultiheadAttention"),
        case(functools.partial(MultiHead, True), ambient, "weights returned"),
        case(MultiHead, leave_as_is, "nn.MultiheadAttention in bfloat16", weights=BF16),
    ]


def hugging_face() -> list[Mixed]:
    found = [
        case(
            llama(use_cache=cache, attn_implementation=spelling), ambient,
            f"Llama, {spelling}, use_cache={cache}", inputs=with_ignored_labels(37),
        )
        for spelling in ("sdpa", "eager")
        for cache in (True, False)
    ]  # fmt: skip
    reentrant = [
        case(
            functools.partial(checkpointed_llama, kind), ambient, f"Llama, reentrant={kind}",
            inputs=with_ignored_labels(37),
        )
        for kind in (True, False)
    ]  # fmt: skip
    return found + reentrant


def checkpointed_llama(reentrant: bool) -> nn.Module:
    model: Any = llama()()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()  # type: ignore[no-any-return]


KINDS = (spellings, of_short_weights, recipes, regions, checkpoints, torch_layers, hugging_face)


@pytest.mark.parametrize("cases", KINDS)
def test_a_split_model_is_as_near_as_the_unsplit_on_two_ranks(ranks2: RankPool, cases: Any) -> None:
    check(ranks2, one_in(10, cases()))


@pytest.mark.slow
@pytest.mark.parametrize("cases", KINDS)
def test_each_model_is_as_near_as_the_unsplit_on_two_ranks(ranks2: RankPool, cases: Any) -> None:
    check(ranks2, cases())


@pytest.mark.slow
@pytest.mark.parametrize("cases", KINDS)
def test_each_model_is_as_near_as_the_unsplit_on_three_ranks(ranks3: RankPool, cases: Any) -> None:
    check(ranks3, cases())


def test_a_split_model_is_as_near_as_the_unsplit_on_three_ranks(ranks3: RankPool) -> None:
    check(ranks3, [found for cases in (recipes, checkpoints) for found in one_in(72, cases()[1:])])


def test_a_plan_under_autocast_has_the_type_that_is_computed_in() -> None:
    with torch.device("meta"):
        model = layers("sdpa")()
    with torch.autocast("cpu", BF16):
        plan = ringfx.plan(model, kwargs=dict(inputs()()), world_size=2)
    assert {layer.site.dtype for layer in plan.layers} == {"bfloat16"}
    assert "of 8, bfloat16" in " ".join(str(plan).split())


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (3, 8)).mT for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v.bfloat16())


def test_operands_of_two_types_without_autocast_are_an_error_that_names_them() -> None:
    """In plain eager torch as well."""
    model, x = TwoTypes(), torch.randn(2, 11, 24)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x)
    with pytest.raises(Exception, match="same dtype"):
        ringfx.optimize(model, compiler="eager")(x)
