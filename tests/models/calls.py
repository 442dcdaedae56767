"""Models that call attention in every form that is known by name, with what must be found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import bias as torch_bias

__all__ = ["CALLS", "HIDDEN", "KEYS", "TOKENS", "CallCase", "embedded"]

BATCH, TOKENS, KEYS, HEADS, DIM = 2, 11, 7, 3, 8
HIDDEN = HEADS * DIM

sdpa = F.scaled_dot_product_attention
aten = torch.ops.aten
P = functools.partial


@dataclass(frozen=True, kw_only=True)
class CallCase:
    model: Callable[[], nn.Module]
    sites: int = 1
    found_by: str = "sdpa"
    mask: str = "full"
    """The mask of the first site in words."""
    backward: bool = True


def embedded(seed: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, TOKENS, HIDDEN, generator=generator).requires_grad_(),)


class Around(nn.Module):
    """Projections to q, k and v [batch, tokens, heads, dim] around one call of attention."""

    def __init__(
        self,
        core: Callable[..., Tensor],
        *,
        heads: int = HEADS,
        kv_heads: int = HEADS,
        keys: int | None = None,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, heads * DIM)
        self.k = nn.Linear(HIDDEN, kv_heads * DIM)
        self.v = nn.Linear(HIDDEN, kv_heads * DIM)
        self.out = nn.Linear(heads * DIM, HIDDEN)
        self.core, self.keys, self.packed = core, keys, packed

    def forward(self, x: Tensor) -> Tensor:
        source = x if self.keys is None else x[:, : self.keys] * 1.5
        q, k, v = (
            layer(y).unflatten(-1, (-1, DIM))
            for layer, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        if not self.packed:
            return self.out(self.core(q, k, v).flatten(2))
        y = self.core(*(t.flatten(0, 1) for t in (q, k, v)))
        return self.out(y.flatten(1).unflatten(0, x.shape[:2]))


def by_heads(call: Callable[..., Tensor], **around: Any) -> Callable[[], nn.Module]:
    """``call`` on [batch, heads, tokens, dim]."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return P(Around, core, **around)


def lower(q_len: int = TOKENS, k_len: int = TOKENS) -> Tensor:
    return torch.arange(q_len)[:, None] >= torch.arange(k_len)


def two_dimensional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over [tokens, dim] of one head and one batch entry after the other."""
    rows = [
        torch.stack([sdpa(q[b, h], k[b, h], v[b, h], is_causal=True) for h in range(HEADS)])
        for b in range(BATCH)
    ]
    return torch.stack(rows)


def one_query_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q[:, :1], k, v)


class MultiHead(nn.Module):
    """nn.MultiheadAttention called with ``call``, whose values may be functions."""

    def __init__(self, call: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.first = options.pop("sequence_first", False)
        self.inner = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=not self.first, **options)
        self.before = nn.Linear(HIDDEN, HIDDEN)
        self.call = {"need_weights": False, **(call or {})}

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = x.transpose(0, 1) if self.first else x
        out, _ = self.inner(x, x, x, **evaluated(self.call))
        return out.transpose(0, 1) if self.first else out


class OtherWidths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(HIDDEN, HEADS, kdim=10, vdim=14, batch_first=True)
        self.k, self.v = nn.Linear(HIDDEN, 10), nn.Linear(HIDDEN, 14)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, self.k(x), self.v(x), need_weights=False)[0]
        return out


class FunctionalMultiHead(nn.Module):
    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(HIDDEN, HEADS)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        m, y = self.inner, x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            y, y, y, HIDDEN, HEADS, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0,
            m.out_proj.weight, m.out_proj.bias, need_weights=self.need_weights,
        )  # fmt: skip
        return out.transpose(0, 1)


class Encoder(nn.Module):
    def __init__(self, call: Mapping[str, Any] | None = None, *, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, 40, 0.0, batch_first=True, norm_first=norm_first
        )
        self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.call = call or {}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, **evaluated(self.call))
        return out


class Decoder(nn.Module):
    def __init__(self, call: Mapping[str, Any] | None = None, *, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            HIDDEN, HEADS, 40, 0.0, batch_first=True, norm_first=norm_first
        )
        self.inner = nn.TransformerDecoder(layer, 2)
        self.memory = nn.Parameter(torch.randn(KEYS, HIDDEN))
        self.call = call or {}

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(BATCH, KEYS, HIDDEN)
        out: Tensor = self.inner(x, memory, **evaluated(self.call))
        return out


class Both(nn.Module):
    def __init__(self, call: Mapping[str, Any] | None = None, *, norm_first: bool = False) -> None:
        super().__init__()
        self.inner = nn.Transformer(
            HIDDEN, HEADS, 2, 2, 40, 0.0, batch_first=True, norm_first=norm_first
        )
        self.target = nn.Parameter(torch.randn(KEYS, HIDDEN))
        self.call = call or {}

    def forward(self, x: Tensor) -> Tensor:
        target = self.target.expand(BATCH, KEYS, HIDDEN)
        out: Tensor = self.inner(x, target, **evaluated(self.call))
        return out


def evaluated(call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in call.items()}


def square(length: int = TOKENS) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def above() -> Tensor:
    return ~lower()


def padding(length: int = TOKENS) -> Tensor:
    return (torch.arange(length) > length - 4)[None].expand(BATCH, length)


def in_eval(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: model().eval()


SDPA: Mapping[str, CallCase] = {
    "positional": CallCase(model=by_heads(lambda q, k, v: sdpa(q, k, v, lower())), mask="causal"),
    "keywords": CallCase(
        model=by_heads(
            lambda q, k, v: sdpa(
                query=q, key=k, value=v, attn_mask=lower(), dropout_p=0.0, is_causal=False
            )
        ),
        mask="causal",
    ),
    "scale": CallCase(model=by_heads(lambda q, k, v: sdpa(q, k, v, scale=0.3))),
    "grouped heads": CallCase(
        model=by_heads(
            lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), heads=4, kv_heads=2
        ),
        mask="causal",
    ),
    "own key length, causal": CallCase(
        model=by_heads(lambda q, k, v: sdpa(q, k, v, is_causal=True), keys=KEYS), mask="causal"
    ),
    "a mask and causal": CallCase(
        model=by_heads(
            lambda q, k, v: sdpa(q, k, v, (torch.arange(TOKENS) != 3)[None], is_causal=True)
        ),
        mask="",
    ),
    "[S, D]": CallCase(model=by_heads(two_dimensional), sites=BATCH * HEADS, mask="causal"),
    "[B, S, D]": CallCase(
        model=P(Around, lambda q, k, v: sdpa(q[:, :, 0], k[:, :, 0], v[:, :, 0])[:, :, None],
                heads=1, kv_heads=1),
    ),
    "[1, B, H, S, D]": CallCase(
        model=by_heads(lambda q, k, v: sdpa(q[None], k[None], v[None], is_causal=True)[0]),
        mask="causal",
    ),
    "[B, 1, H, S, D] under a mask of five dimensions": CallCase(
        model=by_heads(
            lambda q, k, v: sdpa(q[:, None], k[:, None], v[:, None], lower()[(None,) * 3])[:, 0]
        ),
        mask="causal",
    ),
    "one batch of keys": CallCase(model=by_heads(lambda q, k, v: sdpa(q, k[:1], v[:1]))),
    "one head of keys": CallCase(model=by_heads(lambda q, k, v: sdpa(q, k[:, :1], v))),
    "one head of queries": CallCase(
        model=by_heads(one_query_head), mask="full"
    ),
    "causal_upper_left": CallCase(
        model=by_heads(lambda q, k, v: sdpa(q, k, v, torch_bias.causal_upper_left(TOKENS, TOKENS))),
        mask="causal",
    ),
    "causal_lower_right": CallCase(
        model=by_heads(
            lambda q, k, v: sdpa(q, k, v, torch_bias.causal_lower_right(TOKENS, KEYS)), keys=KEYS
        ),
        mask="causal shifted by -4",
    ),
}  # fmt: skip
KERNELS: Mapping[str, CallCase] = {
    "CPU's flash kernel": CallCase(
        model=by_heads(
            lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
        ),
        found_by="_scaled_dot_product_flash_attention_for_cpu", mask="causal",
    ),
    "CPU's flash kernel under a mask": CallCase(
        model=by_heads(
            lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, attn_mask=lower().double().log(), scale=0.2)[0]
        ),
        found_by="_scaled_dot_product_flash_attention_for_cpu", mask="",
    ),
    "the math kernel": CallCase(
        model=by_heads(lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v)[0]),
        found_by="_scaled_dot_product_attention_math",
    ),
    "the math kernel in five dimensions": CallCase(
        model=by_heads(
            lambda q, k, v: aten._scaled_dot_product_attention_math(
                q[None], k[None], v[None], None, 0.0, True)[0][0]
        ),
        found_by="_scaled_dot_product_attention_math", mask="causal",
    ),
}  # fmt: skip
MODULES: Mapping[str, CallCase] = {
    "multi-head": CallCase(model=MultiHead),
    "multi-head, sequence first": CallCase(model=P(MultiHead, sequence_first=True)),
    "multi-head, a boolean mask": CallCase(
        model=P(MultiHead, {"attn_mask": above}), mask="causal"
    ),
    "multi-head, a float mask and its hint": CallCase(
        model=P(MultiHead, {"attn_mask": square, "is_causal": True}), mask="causal"
    ),
    "multi-head, a mask for each head": CallCase(
        model=P(MultiHead, {"attn_mask": lambda: above()[None].expand(6, TOKENS, TOKENS)}),
        mask="",
    ),
    "multi-head, padding": CallCase(model=P(MultiHead, {"key_padding_mask": padding}), mask=""),
    "multi-head, padding and mask": CallCase(
        model=P(MultiHead, {"key_padding_mask": padding, "attn_mask": above}), mask=""
    ),
    "multi-head, keys of zero added": CallCase(model=P(MultiHead, add_zero_attn=True)),
    "multi-head, learned keys added": CallCase(model=P(MultiHead, add_bias_kv=True)),
    "multi-head, other widths": CallCase(model=OtherWidths),
    "multi-head, inference": CallCase(model=in_eval(MultiHead), backward=False),
    "multi-head as a function": CallCase(model=FunctionalMultiHead),
    "multi-head as a function, weights dropped": CallCase(
        model=P(FunctionalMultiHead, need_weights=True), found_by="eager"
    ),
    "multi-head, weights dropped": CallCase(
        model=P(MultiHead, {"need_weights": True, "attn_mask": above}),
        found_by="eager", mask="causal",
    ),
    "multi-head, weights dropped, padding": CallCase(
        model=P(MultiHead, {"need_weights": True, "key_padding_mask": padding}),
        found_by="eager", mask="",
    ),
    "encoder": CallCase(model=Encoder, sites=2),
    "encoder, norm first, hint missing": CallCase(
        model=P(Encoder, {"mask": square}, norm_first=True), sites=2, mask="causal"
    ),
    "encoder, mask and hint": CallCase(
        model=P(Encoder, {"mask": square, "is_causal": True}), sites=2, mask="causal"
    ),
    "encoder, padding": CallCase(
        model=P(Encoder, {"src_key_padding_mask": padding}), sites=2, mask=""
    ),
    "encoder, evaluated with gradients": CallCase(model=in_eval(Encoder), sites=2),
    "encoder, inference": CallCase(model=in_eval(Encoder), sites=2, backward=False),
    "decoder": CallCase(model=Decoder, sites=4),
    "decoder, norm first, hint missing": CallCase(
        model=P(Decoder, {"tgt_mask": square}, norm_first=True), sites=4, mask="causal"
    ),
    "decoder, memory padded": CallCase(
        model=P(Decoder, {"memory_key_padding_mask": P(padding, KEYS)}), sites=4
    ),
    "encoder and decoder": CallCase(model=Both, sites=6),
    "encoder and decoder, hint missing": CallCase(
        model=P(Both, {"tgt_mask": P(square, KEYS)}), sites=6
    ),
    "encoder and decoder, norm first, inference": CallCase(
        model=in_eval(P(Both, norm_first=True)), sites=6, backward=False
    ),
}  # fmt: skip
CALLS: Mapping[str, CallCase] = {**SDPA, **KERNELS, **MODULES}
