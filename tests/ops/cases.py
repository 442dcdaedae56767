"""Attentions of every kind that strategies must compute, small, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import LayoutKind
from ringfx.ir.tiles import CAUSAL, SCORE, B, Expr, H, K, Q, conjunction
from tests.ops.oracle import Example

STRATEGIES = ("simple", "collective", "production", "ulysses")
LENGTH = 21
BATCH = 2
HEADS = 4

WINDOW: Expr = ("gt", K, ("sub", Q, ("const", 5)))
DOCUMENTS: Expr = ("eq", ("at", 0, B, Q), ("at", 0, B, K))
PADDING: Expr = ("at", 0, B, K)
PREFIX: Expr = ("or", CAUSAL, ("lt", K, ("const", 4)))
ALIBI: Expr = ("mul", ("at", 0, H), ("sub", K, Q))
RELATIVE: Expr = ("at", 0, ("add", ("sub", K, Q), ("const", 30)), H)
MATRIX: Expr = ("at", 0, H, Q, K)
MAPPED: Expr = (
    "add",
    ("mul", ("at", 0, H), ("tanh", ("div", SCORE, ("at", 0, H)))),
    ("mul", ("mul", ("at", 1), ("abs", ("sub", Q, K))), ("sigmoid", SCORE)),
)


def document_ids() -> Sequence[torch.Tensor]:
    """Two packings: 9 + 9 + 3 tokens, and 4 + 17."""
    return (torch.tensor([[0] * 9 + [1] * 9 + [2] * 3, [0] * 4 + [1] * 17]),)


def key_padding() -> Sequence[torch.Tensor]:
    """Left padding in one batch entry, so that causal rows lose all keys, right in the other."""
    kept = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    kept[0, :4] = False
    kept[1, -6:] = False
    return (kept,)


def long_padding() -> Sequence[torch.Tensor]:
    """Rows without keys in tiles that are large enough for fused kernels."""
    kept = torch.ones(BATCH, 100, dtype=torch.bool)
    kept[0, :40] = False
    return (kept,)


def slopes() -> Sequence[torch.Tensor]:
    return (torch.rand(HEADS, dtype=torch.float64),)


def relative_table() -> Sequence[torch.Tensor]:
    return (torch.randn(64, HEADS, dtype=torch.float64),)


def matrix() -> Sequence[torch.Tensor]:
    return (torch.randn(HEADS, LENGTH, LENGTH, dtype=torch.float64),)


def sinks() -> Sequence[torch.Tensor]:
    return (torch.randn(HEADS, dtype=torch.float64),)


def padding_and_sinks() -> Sequence[torch.Tensor]:
    return (*key_padding(), *sinks())


def spec(q_len: int = LENGTH, kv_len: int | None = None, **fields: Any) -> AttentionSpec:
    return AttentionSpec(scale=0.3, q_len=q_len, kv_len=kv_len or q_len, **fields)


def seed() -> Sequence[torch.Tensor]:
    return (torch.tensor([987_654_321]),)


def dropping() -> Iterator[tuple[str, Example]]:
    """Dropout beside every other kind: what it drops must not depend on the split or the mask."""
    for name, label in {
        "full": "alone", "causal": "causal", "window": "window", "documents": "documents",
        "padding": "padding", "padding, mean of v": "rows without keys",
        "relative bias, trained": "trained bias", "soft cap": "soft cap", "score map": "score map",
        "sinks, trained": "sinks", "cross": "cross", "one token": "one token",
        "grouped heads, smaller v": "grouped heads", "divisible": "divisible",
    }.items():  # fmt: skip
        base = PLAIN[name]
        make = partial(with_seed, base.make_inputs)
        yield label, replace(base, spec=replace(base.spec, dropout=0.3), make_inputs=make)
    moved = spec(keep=("ge", K, ("const", 3)), dropout=0.3, counts_from=(3, 3))
    yield "of a window", Example(spec=moved, make_inputs=seed)


def with_seed(make_inputs: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    return (*make_inputs(), *seed())


def cap_of_heads() -> Sequence[torch.Tensor]:
    """One a head, and a number for all."""
    return (torch.rand(HEADS, dtype=torch.float64) + 0.5, torch.tensor(0.8, dtype=torch.float64))


def table_and_padding() -> Sequence[torch.Tensor]:
    return (*relative_table(), *key_padding())


def no_keys() -> Sequence[torch.Tensor]:
    """One batch entry without any key, the other with all."""
    return (torch.tensor([[False], [True]]).expand(BATCH, LENGTH).contiguous(),)


def lost_rows() -> Iterator[tuple[str, str, Example]]:
    """Every meaning of a row without keys, under masks that lose rows in many ways."""
    padded = conjunction(CAUSAL, PADDING)
    for meaning in ("zero", "mean", "absorbed", "nan"):
        fields: dict[str, Any] = {"fully_masked": meaning}
        yield "causal", meaning, Example(spec=spec(keep=padded, **fields), make_inputs=key_padding)
        yield (
            "window", meaning,
            Example(spec=spec(keep=conjunction(CAUSAL, WINDOW, PADDING), **fields),
                    make_inputs=key_padding),
        )  # fmt: skip
        yield (
            "a batch entry", meaning,
            Example(spec=spec(keep=PADDING, **fields), make_inputs=no_keys),
        )  # fmt: skip
        yield (
            "by position", meaning,
            Example(spec=spec(keep=("and", CAUSAL, ("gt", K, ("const", 6))), **fields)),
        )  # fmt: skip
        yield (
            "grouped, soft cap", meaning,
            Example(spec=spec(keep=padded, soft_cap=2.0, **fields), make_inputs=key_padding,
                    kv_heads=2, v_head_dim=5),
        )  # fmt: skip
        yield (
            "trained bias", meaning,
            Example(spec=spec(keep=conjunction(CAUSAL, ("at", 1, B, K)), bias=RELATIVE, **fields),
                    make_inputs=table_and_padding, trains_inputs=True),
        )  # fmt: skip


LOST: Mapping[str, Example] = {
    f"rows without keys: {kind}, {meaning}": example for kind, meaning, example in lost_rows()
}
PLAIN: Mapping[str, Example] = {
    "full": Example(spec=spec()),
    "causal": Example(spec=spec(keep=CAUSAL)),
    "causal, 3 tokens": Example(spec=spec(3, keep=CAUSAL)),
    "one token": Example(spec=spec(1)),
    "window": Example(spec=spec(keep=conjunction(CAUSAL, WINDOW))),
    "documents": Example(spec=spec(keep=conjunction(CAUSAL, DOCUMENTS)), make_inputs=document_ids),
    "padding": Example(spec=spec(keep=conjunction(CAUSAL, PADDING)), make_inputs=key_padding),
    "padding, mean of v": Example(
        spec=spec(keep=conjunction(CAUSAL, PADDING), fully_masked="mean"), make_inputs=key_padding
    ),
    "padding, 100 tokens": Example(
        spec=spec(100, keep=conjunction(CAUSAL, PADDING), fully_masked="mean"),
        make_inputs=long_padding,
    ),
    **LOST,
    "prefix": Example(spec=spec(keep=PREFIX)),
    "alibi": Example(spec=spec(keep=CAUSAL, bias=ALIBI), make_inputs=slopes),
    "alibi, trained": Example(
        spec=spec(keep=CAUSAL, bias=ALIBI), make_inputs=slopes, trains_inputs=True
    ),
    "relative bias, trained": Example(
        spec=spec(bias=RELATIVE), make_inputs=relative_table, trains_inputs=True
    ),
    "bias matrix a head": Example(spec=spec(bias=MATRIX), make_inputs=matrix),
    "score map": Example(spec=spec(score_map=MAPPED), make_inputs=cap_of_heads, trains_inputs=True),
    "score map and soft cap, window": Example(
        spec=spec(keep=conjunction(CAUSAL, WINDOW), score_map=MAPPED, soft_cap=2.0),
        make_inputs=cap_of_heads,
        trains_inputs=True,
        kv_heads=2,
    ),
    "score map, rows without keys": Example(
        spec=spec(
            keep=("and", CAUSAL, ("gt", K, ("const", 6))), score_map=MAPPED, fully_masked="absorbed"
        ),
        make_inputs=cap_of_heads,
        trains_inputs=True,
    ),
    "soft cap": Example(spec=spec(keep=CAUSAL, soft_cap=2.0)),
    "soft cap and trained bias": Example(
        spec=spec(bias=RELATIVE, soft_cap=2.0), make_inputs=relative_table, trains_inputs=True
    ),
    "sinks, trained": Example(
        spec=spec(keep=CAUSAL, sinks=True), make_inputs=sinks, trains_inputs=True
    ),
    "sinks and rows without keys": Example(
        spec=spec(keep=conjunction(CAUSAL, PADDING), sinks=True, fully_masked="mean"),
        make_inputs=padding_and_sinks,
        trains_inputs=True,
    ),
    "cross": Example(spec=spec(13, 30)),
    "cross, two keys": Example(spec=spec(30, 2)),
    "causal, more keys": Example(spec=spec(13, 30, keep=CAUSAL)),
    "causal, more queries": Example(spec=spec(30, 13, keep=CAUSAL)),
    "grouped heads, smaller v": Example(spec=spec(keep=CAUSAL), kv_heads=2, v_head_dim=5),
    "one key head, larger v": Example(spec=spec(keep=CAUSAL), kv_heads=1, v_head_dim=11),
    "divisible": Example(spec=spec(24, keep=CAUSAL)),
}
DROPPING = {f"dropout, {label}": example for label, example in dropping()}
KINDS: Mapping[str, Example] = {**PLAIN, **DROPPING}


def examples(world_size: int, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Example]:
    """Each kind in each strategy that admits it, in both layouts."""
    for label in kinds:
        for strategy in STRATEGIES:
            if strategy == "ulysses" and HEADS % world_size:
                continue
            for layout in get_args(LayoutKind):
                both = strategy == "production" or label not in {*LOST, *DROPPING}
                if layout == "contiguous" and not both:
                    continue  # layouts matter where a ring may end early
                yield replace(
                    KINDS[label],
                    strategy=strategy,
                    layout=layout,
                    label=f"{label}, {strategy}, {layout}, {world_size} ranks",
                )
