"""Hugging Face models whose attention is spelled out: all of it found, results as unsplit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ringfx.ir.values import Sites
from ringfx.passes.detect import detect
from ringfx.passes.masks import recover
from tests.models import hugging_face as models
from tests.support.harness import Case, RankPool, compare_all, compare_here
from tests.support.programs import captured
from tests.support.sampling import one_in

Inputs = Callable[[], Mapping[str, Any]]
MODELS: Mapping[str, tuple[Callable[[], nn.Module], Inputs, list[str]]] = {
    "llama": (models.llama, models.tokens(13), ["causal"] * 2),
    "llama, padded": (models.llama, models.tokens(13, padded=True), ["causal, key padding"] * 2),
    "gpt2": (models.gpt2, models.tokens(13), ["causal"] * 2),
    "gemma2": (models.gemma2, models.tokens(13), ["causal, window 5", "causal"]),
    "gpt_oss": (models.gpt_oss, models.tokens(13), ["causal, window 5", "causal"]),
}
T5 = (models.t5, models.source_and_target(13, 9))


def sites_of(model: Callable[[], nn.Module], inputs: Inputs) -> Sites:
    torch.manual_seed(0)
    program = captured(model(), **inputs())
    return recover(program, detect(program))


@pytest.mark.parametrize("name", one_in(2, MODELS))
def test_every_attention_is_found_and_its_mask_is_named(name: str) -> None:
    model, inputs, words = MODELS[name]
    sites = sites_of(model, inputs)
    assert [site.found_by for site in sites.found] == ["eager"] * 2
    assert [site.mask_words for site in sites.found] == words
    assert sites.declined == ()


def test_grouped_heads_ship_only_their_own_keys() -> None:
    (site, _) = sites_of(*MODELS["llama"][:2]).found
    assert (site.heads, site.kv_heads, site.batch) == (4, 2, 2)


def test_a_soft_cap_and_sinks_are_read() -> None:
    assert [s.spec.soft_cap for s in sites_of(*MODELS["gemma2"][:2]).found] == [50.0, 50.0]
    assert [s.spec.sinks for s in sites_of(*MODELS["gpt_oss"][:2]).found] == [True, True]


def test_t5_has_three_attentions_one_of_them_across() -> None:
    sites = sites_of(*T5)
    assert [(s.q_len, s.kv_len) for s in sites.found] == [(13, 13), (9, 9), (9, 13)]
    assert {s.spec.scale for s in sites.found} == {1.0}
    assert sites.found[0].spec.bias is not None


def case(name: str, model: Callable[[], nn.Module], inputs: Inputs) -> Case:
    options = {"compiler": "eager", "on_unsupported": "gather"}
    return Case(model=model, inputs=inputs, options=options, loss=models.square_of_logits,
                label=name)  # fmt: skip


CASES = [case(name, *MODELS[name][:2]) for name in MODELS] + [case("t5", *T5)]


@pytest.mark.ranks
def test_results_and_gradients_on_two_ranks(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, one_in(3, CASES)):
        found.check()


@pytest.mark.ranks
@pytest.mark.slow
def test_results_and_gradients_on_three_ranks(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, CASES):
        found.check()


@pytest.mark.parametrize("found", one_in(3, CASES), ids=lambda c: c.label)
def test_results_and_gradients_at_one_rank(found: Case) -> None:
    compare_here(found).check()
