"""Attention sites and strategies to cost, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringfx import tiles
from ringfx.cost_model.profile import Profile, available_profiles
from ringfx.passes.values import AttentionSite
from ringfx.spec import AttentionSpec


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


def shipped(name: str) -> Profile:
    return next(p for p in available_profiles() if p.name == name)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    reason: str
    remedy: str


@dataclass(frozen=True)
class Row:
    """A strategy that admits all sites, or those whose heads the ranks divide."""

    needs_heads: bool = False

    def admits(self, site: AttentionSite, world_size: int, /) -> Refusal | None:
        if not self.needs_heads or site.heads % world_size == 0:
            return None
        sizes = [n for n in range(2, site.heads + 1) if site.heads % n == 0]
        return Refusal(
            reason=f"needs heads % ranks == 0; here {site.heads} heads, {world_size} ranks",
            remedy=f"use {', '.join(map(str, sizes[:-1]))} or {sizes[-1]} ranks",
        )


TABLE: Mapping[str, Row] = {
    "simple": Row(),
    "collective": Row(),
    "production": Row(),
    "ulysses": Row(needs_heads=True),
}
