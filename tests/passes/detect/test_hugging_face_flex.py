"""Models set to flex_attention equal their other selves, padding and all, and train on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import ringfx
from ringfx.ir.note import NoteKind, texts_of
from tests.passes.detect.test_hugging_face_flash import (
    DECODER,
    bert,
    ids,
    llama,
    mistral,
    packed,
    padded,
)
from tests.support.harness import RankPool, gradient_differences
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks


def gemma2() -> torch.nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(head_dim=12, sliding_window=5, **DECODER))


CASES: Mapping[str, tuple[Any, Any, list[str]]] = {
    "padded in front": (llama, lambda: padded(front=3), ["causal, key padding"]),
    "packed": (llama, packed, ["causal, packed documents"]),
    "window": (mistral, lambda: padded(behind=4), ["causal, window 4, key padding"]),
    "encoder": (bert, lambda: padded(behind=4), ["key padding"]),
    "soft cap": (gemma2, lambda: {"input_ids": ids()}, ["causal", "causal, window 5"]),
}


def difference(name: str) -> tuple[float, float, list[str], list[str]]:
    """Of outputs at real tokens and of gradients; masks; graph breaks."""
    make, inputs, _ = CASES[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = make().double().eval()
    stock.set_attn_implementation("eager" if name == "soft cap" else "sdpa")
    ours = copy.deepcopy(stock)
    ours.set_attn_implementation("flex_attention")
    optimized = ringfx.optimize(ours, compiler="eager")
    given = inputs()
    real = given.get("attention_mask", torch.ones(given["input_ids"].shape)).bool()
    outs = [model(**given)[0][real] for model in (stock, optimized)]
    for out in outs:
        out.square().mean().backward()
    found, wanted = ({n: p.grad for n, p in m.named_parameters()} for m in (ours, stock))
    plan = optimized.plan
    return (
        float((outs[0] - outs[1]).detach().abs().max()),
        max(gradient_differences(found, wanted).values()),
        sorted({layer.mask for layer in plan.layers}),
        texts_of(plan.notes, NoteKind.GRAPH_BREAK),
    )


def differences(names: list[str]) -> list[Any]:
    return [difference(name) for name in names]


def test_flex_attention_is_exact_on_two_ranks_and_breaks_no_graph(ranks2: RankPool) -> None:
    names = one_in(3, CASES)
    for by_name in ranks2.run(differences, names):
        for name, (outputs, gradients, masks, breaks) in zip(names, by_name, strict=True):
            bound = 1e-4 if name == "soft cap" else 1e-10  # the model's softmax is in float32
            assert outputs < bound, name
            assert gradients < bound, name
            assert masks == CASES[name][2], name
            assert breaks == [], name
