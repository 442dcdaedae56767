"""Models set to flash_attention_2, on a machine where flash-attn cannot run, equal their SDPA."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import ringfx
from ringfx.ir.note import NoteKind, texts_of
from tests.support.harness import RankPool
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks

TOKENS = 13
SIZES: Mapping[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "use_cache": False, "initializer_range": 0.2}


def ids(batch: int = 2) -> torch.Tensor:
    return torch.arange(batch * TOKENS).view(batch, TOKENS) * 7 % 96


def padded(front: int = 0, behind: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :front] = 0
    mask[1, TOKENS - behind :] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def packed() -> dict[str, torch.Tensor]:
    position_ids = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)])[None]
    return {"input_ids": ids(1), "position_ids": position_ids}


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def mistral() -> torch.nn.Module:
    return MistralForCausalLM(MistralConfig(**DECODER, sliding_window=4))


def bert() -> torch.nn.Module:
    return BertModel(BertConfig(**SIZES))


CASES: Mapping[str, tuple[Any, Any, str]] = {
    "plain": (llama, lambda: {"input_ids": ids()}, "causal"),
    "padded behind": (llama, lambda: padded(behind=4), "causal, query padding, key padding"),
    "padded in front": (llama, lambda: padded(front=3), "causal, query padding, key padding"),
    "packed": (llama, packed, "causal, packed documents"),
    "window": (
        mistral, lambda: padded(behind=4), "causal, window 4, query padding, key padding",
    ),
    "encoder": (bert, lambda: padded(behind=4), "query padding, key padding"),
}  # fmt: skip


def difference(name: str) -> tuple[float, list[str], list[str], list[str]]:
    """Largest difference at real tokens, outputs and gradients; sites; masks; graph breaks."""
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    stock = make().double().eval()
    ours = copy.deepcopy(stock)
    ours.config._attn_implementation = "flash_attention_2"
    optimized = ringfx.optimize(ours, compiler="eager")
    given = inputs()
    real = given.get("attention_mask", torch.ones(given["input_ids"].shape)).bool()
    outs = [model(**given)[0][real] for model in (stock, optimized)]
    for out in outs:
        out.square().mean().backward()
    pairs = [outs, *zip((p.grad for p in stock.parameters()), (p.grad for p in ours.parameters()),
                        strict=True)]  # fmt: skip
    worst = max(float((a - b).detach().abs().max()) for a, b in pairs if a is not None)
    plan = optimized.plan
    return (
        worst,
        [layer.found_by for layer in plan.layers],
        sorted({layer.mask for layer in plan.layers}),
        texts_of(plan.notes, NoteKind.GRAPH_BREAK),
    )


def differences(names: list[str]) -> list[Any]:
    return [difference(name) for name in names]


def test_padding_packing_and_windows_are_exact_on_two_ranks_without_graph_breaks(
    ranks2: RankPool,
) -> None:
    names = one_in(3, CASES)
    for by_name in ranks2.run(differences, names):
        for name, (worst, found_by, masks, breaks) in zip(names, by_name, strict=True):
            assert worst < 1e-12, name
            assert found_by == ["_flash_attention_forward"] * 2, name
            assert masks == [CASES[name][2]], name
            assert breaks == [], name
