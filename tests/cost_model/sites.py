"""Attention sites and strategies to cost, without a model."""

from __future__ import annotations

import math
from typing import Any

from ringfx.cost_model.prediction.predict import Prediction, predict
from ringfx.cost_model.prediction.profile import Profile, available_profiles
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.memory_plan import MARGIN
from ringfx.ir.values import AttentionSite
from ringfx.strategies import STRATEGIES


def causal_site(layer: int = 0, tokens: int = 8192, **changes: Any) -> AttentionSite:
    """An attention of a Llama-like layer; ``changes`` are fields of AttentionSite."""
    fields: dict[str, Any] = {
        "node": f"attention_{layer}",
        "name": f"model.layers.{layer}.self_attn",
        "source": "/opt/models/llama/modeling_llama.py:254",
        "found_by": "sdpa",
        "spec": AttentionSpec(scale=0.125, q_len=tokens, kv_len=tokens, keep=tiles.CAUSAL),
        "mask_words": "causal",
        "density": 0.5,
        "balanced": False,
        "batch": 1,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "v_head_dim": 128,
        "dtype": "bfloat16",
        "device": "cuda",
        "trains": True,
    }
    return AttentionSite(**{**fields, **changes})


def full_site(layer: int = 0, tokens: int = 8192, **changes: Any) -> AttentionSite:
    """The same without a mask."""
    spec = AttentionSpec(scale=0.125, q_len=tokens, kv_len=tokens)
    words = {"spec": spec, "mask_words": "none", "density": 1.0, "balanced": True}
    return causal_site(layer, tokens, **{**words, **changes})


def predicted(site: AttentionSite, strategy: str, world_size: int, profile: Profile) -> Prediction:
    return predict(site, STRATEGIES[strategy], world_size, profile)


def shipped(name: str) -> Profile:
    return next(p for p in available_profiles() if p.name == name)


def budget_for(size: int) -> int:
    """The least budget whose margin leaves so many bytes."""
    budget = math.floor(size / (1 - MARGIN)) - 2
    while round((1 - MARGIN) * budget) < size:
        budget += 1
    return budget
