"""Models that call flash-attn and xformers (stand-ins of them), with what must be found."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.calls import KEYS, TOKENS, Around, CallCase

STAND_INS = str(Path(__file__).parents[1] / "stand_ins")
sys.path.insert(0, STAND_INS)
import flash_attn  # noqa: E402
import flash_attn_interface as flash_attn_3  # noqa: E402
import xformers.ops as xops  # noqa: E402
from dense_definition import CALLS as RAN  # noqa: E402
from xformers.ops.fmha import attn_bias  # noqa: E402

sys.path.remove(STAND_INS)

__all__ = ["PACKAGES", "RAN", "SLOPES", "attend_by_flash", "attend_by_xformers"]

P = functools.partial
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.3], dtype=torch.float64)
GROUPED = {"heads": 4, "kv_heads": 2}
LENGTHS, KEY_LENGTHS = (5, 3, 14), (2, 8, 4)
"""Documents of two sequences of 11 tokens, and of 7 keys, laid end to end."""


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attend_by_flash(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return flash_attn.flash_attn_func(q, k, v, **options)


def flash(**options: Any) -> Callable[[], nn.Module]:
    keys = options.pop("keys", None)
    return P(Around, P(attend_by_flash, **options), keys=keys, **GROUPED)


def packed(function: Any = flash_attn.flash_attn_varlen_func, **options: Any) -> Any:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Any:
        cu = starts(LENGTHS)
        return function(q, k, v, cu, cu, max(LENGTHS), max(LENGTHS), **options)

    return P(Around, core, packed=True, **GROUPED)


def packed_across(**options: Any) -> Any:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn.flash_attn_varlen_func(
            q, k, v, starts(LENGTHS), starts(KEY_LENGTHS), max(LENGTHS), max(KEY_LENGTHS), **options
        )

    return P(Around, core, packed=True, keys=KEYS, **GROUPED)


def scaled_by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    return out * lse.transpose(1, 2)[..., None]


FLASH: Mapping[str, CallCase] = {
    name: CallCase(model=model, found_by=f"flash_attn_{kind}func", mask=mask)
    for name, (model, kind, mask) in {
        "plain": (flash(), "", "full"),
        "causal": (flash(causal=True), "", "causal"),
        "causal, bottom-right": (flash(causal=True, keys=KEYS), "", "causal shifted by -4"),
        "window": (flash(causal=True, window_size=(3, 0)), "", "causal, window 4"),
        "window on both sides": (flash(window_size=(3, 2), softmax_scale=0.3), "", ""),
        "ALiBi": (flash(causal=True, alibi_slopes=SLOPES), "", "causal, ALiBi bias"),
        "soft cap": (flash(causal=True, softcap=2.0), "", "causal"),
        "ALiBi for each batch entry": (
            flash(causal=True, alibi_slopes=torch.stack([SLOPES, SLOPES * 2])), "", "",
        ),
        "logsumexp dropped": (
            P(Around, lambda q, k, v: attend_by_flash(q, k, v, return_attn_probs=True)[0]), "",
            "full",
        ),
        "logsumexp used": (P(Around, scaled_by_logsumexp), "", "causal"),
        "qkv packed": (
            P(
                Around,
                lambda q, k, v: flash_attn.flash_attn_qkvpacked_func(
                    torch.stack([q, k, v], 2), causal=True
                ),
            ),
            "qkvpacked_", "causal",
        ),
        "kv packed": (
            P(
                Around,
                lambda q, k, v: flash_attn.flash_attn_kvpacked_func(
                    q, torch.stack([k, v], 2), causal=True
                ),
                **GROUPED,
            ),
            "kvpacked_", "causal",
        ),
        "documents": (packed(causal=True), "varlen_", "causal, packed documents"),
        "documents, full": (packed(), "varlen_", "packed documents"),
        "documents, window": (
            packed(causal=True, window_size=(2, 0)), "varlen_",
            "causal, packed documents, window 3",
        ),
        "documents, ALiBi": (packed(causal=True, alibi_slopes=SLOPES), "varlen_", ""),
        "documents, other keys": (packed_across(causal=True), "varlen_", ""),
        "documents, other keys, window": (packed_across(window_size=(2, 1)), "varlen_", ""),
        "documents, qkv packed": (
            P(
                Around,
                lambda q, k, v: flash_attn.flash_attn_varlen_qkvpacked_func(
                    torch.stack([q, k, v], 1), starts(LENGTHS), max(LENGTHS), causal=True
                ),
                packed=True,
            ),
            "varlen_qkvpacked_", "causal, packed documents",
        ),
        "documents, kv packed": (
            P(
                Around,
                lambda q, k, v: flash_attn.flash_attn_varlen_kvpacked_func(
                    q, torch.stack([k, v], 1), starts(LENGTHS), starts(LENGTHS), 14, 14
                ),
                packed=True,
                **GROUPED,
            ),
            "varlen_kvpacked_", "",
        ),
        "version 3": (
            P(
                Around,
                lambda q, k, v: flash_attn_3.flash_attn_func(
                    q, k, v, causal=True, window_size=(4, 0)
                ),
                **GROUPED,
            ),
            "3_", "causal, window 5",
        ),
        "version 3, documents": (
            packed(flash_attn_3.flash_attn_varlen_func, causal=True), "3_varlen_",
            "causal, packed documents",
        ),
        "version 3, heads packed": (
            P(
                Around,
                lambda q, k, v: flash_attn_3.flash_attn_qkvpacked_func(
                    torch.cat([q, k, v], 2), causal=True, num_heads_q=4
                ),
                **GROUPED,
            ),
            "3_qkvpacked_", "causal",
        ),
    }.items()
}  # fmt: skip


def attend_by_xformers(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Callable[[], Any] | None = None, **options: Any
) -> Any:
    made = None if bias is None else bias()
    return xops.memory_efficient_attention(q, k, v, attn_bias=made, **options)


def in_one_row(q: Tensor, k: Tensor, v: Tensor, *, bias: Callable[[], Any]) -> Any:
    """Packed tokens as xformers takes them: a batch of one."""
    return attend_by_xformers(q[None], k[None], v[None], bias=bias)[0]


def blocks(kind: str = "", *arguments: int, across: bool = False) -> Callable[[], Any]:
    """A block-diagonal mask, changed by the method ``kind``."""

    def make() -> Any:
        of_keys = KEY_LENGTHS if across else None
        mask = attn_bias.BlockDiagonalMask.from_seqlens(LENGTHS, of_keys)
        return getattr(mask, kind)(*arguments) if kind else mask

    return make


def in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped heads as [batch, tokens, groups, heads, dim], keys expanded."""
    k, v = (x[:, :, :, None].expand(-1, -1, -1, 2, -1) for x in (k, v))
    grouped: Tensor = attend_by_xformers(q.unflatten(2, (2, 2)), k, v)
    return grouped.flatten(2, 3)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found: Tensor = attend_by_xformers(
        q[:, :, 0], k[:, :, 0], v[:, :, 0], bias=xops.LowerTriangularMask
    )
    return found[:, :, None]


def with_bias() -> Any:
    bias = torch.arange(TOKENS, dtype=torch.float64).mul(-0.125).expand(2, 3, TOKENS, TOKENS)
    return xops.LowerTriangularMask().add_bias(bias)


def tensor_bias() -> Tensor:
    far = torch.arange(TOKENS, dtype=torch.float64)
    return -(far[:, None] - far).abs().div(4).expand(2, 3, TOKENS, TOKENS)


MADE_BEFORE = blocks("make_causal")()
BOTTOM_RIGHT = attn_bias.LowerTriangularFromBottomRightMask
XFORMERS: Mapping[str, CallCase] = {
    name: CallCase(model=model, found_by="memory_efficient_attention", mask=mask)
    for name, (model, mask) in {
        "no bias": (P(Around, P(attend_by_xformers, scale=0.2)), "full"),
        "lower triangle": (
            P(Around, P(attend_by_xformers, bias=xops.LowerTriangularMask)), "causal",
        ),
        "lower triangle and a tensor": (P(Around, P(attend_by_xformers, bias=with_bias)), ""),
        "a tensor": (P(Around, P(attend_by_xformers, bias=tensor_bias)), ""),
        "bottom-right": (
            P(Around, P(attend_by_xformers, bias=BOTTOM_RIGHT), keys=KEYS), "causal shifted by -4",
        ),
        "bottom-right, local": (
            P(Around, P(attend_by_xformers, bias=lambda: BOTTOM_RIGHT().make_local_attention(3))),
            "causal, window 3",
        ),
        "local on both sides": (
            P(
                Around,
                P(
                    attend_by_xformers,
                    bias=lambda: attn_bias.LocalAttentionFromBottomRightMask(2, 1),
                ),
                keys=KEYS,
            ),
            "",
        ),
        "blocks": (P(Around, P(in_one_row, bias=blocks()), packed=True), "packed documents"),
        "blocks, causal": (
            P(Around, P(in_one_row, bias=blocks("make_causal")), packed=True),
            "causal, packed documents",
        ),
        "blocks made before": (
            P(Around, P(in_one_row, bias=lambda: MADE_BEFORE), packed=True),
            "causal, packed documents",
        ),
        "blocks, other keys": (
            P(
                Around, P(in_one_row, bias=blocks("make_causal", across=True)),
                packed=True, keys=KEYS,
            ),
            "",
        ),
        "blocks, bottom-right": (
            P(Around, P(in_one_row, bias=blocks("make_causal_from_bottomright")), packed=True),
            "causal, packed documents",
        ),
        "blocks, local": (
            P(Around, P(in_one_row, bias=blocks("make_local_attention", 2)), packed=True),
            "causal, packed documents, window 2",
        ),
        "blocks, local, bottom-right": (
            P(
                Around, P(in_one_row, bias=blocks("make_local_attention_from_bottomright", 2)),
                packed=True,
            ),
            "causal, packed documents, window 2",
        ),
        "grouped heads": (P(Around, in_groups, **GROUPED), "full"),
        "without heads": (P(Around, one_head, heads=1, kv_heads=1), "causal"),
    }.items()
}  # fmt: skip
PACKAGES: Mapping[str, CallCase] = {
    **{f"flash-attn, {name}": case for name, case in FLASH.items()},
    **{f"xformers, {name}": case for name, case in XFORMERS.items()},
}
