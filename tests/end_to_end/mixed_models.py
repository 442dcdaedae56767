"""Small models whose values are of several types, one for each way of spelling attention."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

__all__ = ["CORES", "Disabled", "Inside", "Layers", "MultiHead", "inputs", "layers"]

WIDTH, HEADS, LAYERS = 32, 4, 2
_packages: Any = importlib.import_module("tests.models.package_calls")


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    bias = -0.1 * (at[:, None] - at).abs().float()
    bias = bias.masked_fill(at[:, None] < at, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = hidden(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return mixed


def wide_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of the narrow type, softmax in float32, and back: Hugging Face's eager form."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    weights = hidden(torch.matmul(q, k.mT) * q.shape[-1] ** -0.5).softmax(-1, dtype=wide)
    return torch.matmul(weights.to(v.dtype), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = hidden(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]))
    return torch.einsum("bhqk,bhkd->bhqd", F.softmax(scores, dim=-1), v)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """baddbmm and bmm on heads laid into the batch."""
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    empty = flat[0].new_zeros(1, 1, 1).expand(flat[0].shape[0], q.shape[2], q.shape[2])
    scores = torch.baddbmm(empty, flat[0], flat[1].mT, beta=0, alpha=q.shape[-1] ** -0.5)
    mixed: Tensor = torch.bmm(hidden(scores).softmax(-1), flat[2]).unflatten(0, q.shape[:2])
    return mixed


def hidden(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    return scores.masked_fill(at[:, None] < at, torch.finfo(scores.dtype).min)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    length = q.shape[2]
    mask = create_block_mask(causal, None, None, length, length, device="cpu")
    return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask)  # type: ignore[return-value]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package takes one type, so that its callers cast, as Hugging Face does."""
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    result: Tensor = _packages.attend_by_flash(q, k, v, causal=True)
    return result.transpose(1, 2)


CORES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (sdpa, sdpa_biased, spelled_out, wide_softmax, einsum, batched, flex, flash)
}


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding with float32 tables: its result is float32 where x is narrower."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * 100.0 ** -(torch.arange(half) / half)
    cos, sin = (f(angles).to(torch.promote_types(x.dtype, torch.float32)) for f in (torch.cos, torch.sin))  # fmt: skip  # noqa: E501
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class WideNorm(nn.Module):
    """Computes in float32 whatever it is given, as Llama's does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * (
            self.weight
        )


class Layer(nn.Module):
    def __init__(self, core: str, narrow_operands: bool) -> None:
        super().__init__()
        self.norm, self.after = WideNorm(), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.core, self.narrow_operands = CORES[core], narrow_operands

    def forward(self, x: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))  # fmt: skip  # noqa: E501
        q, k, v = heads
        q, k = rotated(q), rotated(k)
        if self.narrow_operands:
            q, k = q.to(v.dtype), k.to(v.dtype)
        x = x + self.out(self.core(q, k, v).to(v.dtype).transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.after(x))))
        return result


class Layers(nn.Module):
    """Two layers, their head and a loss; ``kind`` is how layers are called."""

    def __init__(self, core: str, kind: str = "plain", narrow_operands: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words = nn.Embedding(61, WIDTH)
        self.layers = nn.ModuleList(Layer(core, narrow_operands) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 61, bias=False)
        self.kind = kind
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.25)

    def body(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = self.run(layer, x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return layer(x)  # type: ignore[no-any-return]
        if self.kind == "reentrant":
            x = x.requires_grad_() if x.is_leaf else x
        return checkpoint(layer, x, use_reentrant=self.kind == "reentrant")  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.body(ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


class Inside(Layers):
    """Autocast entered by the model itself, around the body; the loss outside."""

    def body(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().body(ids)


class Decorated(Layers):
    @torch.autocast("cpu", torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(ids)


class Disabled(Layers):
    """A part in full precision, as numerically delicate ones are, and autocast again inside it."""

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        x = super().run(layer, x)
        with torch.autocast("cpu", enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            y = wide @ self.words.weight[:WIDTH].to(wide.dtype)
            with torch.autocast("cpu", torch.bfloat16):
                z = wide @ self.words.weight[:WIDTH]
        return x + 0.1 * y.to(x.dtype) + 0.1 * z.to(x.dtype)


class FullAttention(Layers):
    """Attention alone in full precision."""

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            y = super().run(layer, wide)
        return y


class MultiHead(nn.Module):
    """torch's own layers."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words = nn.Embedding(61, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        # Not ReLU: on which side of its kink a number falls is chance in short types.
        self.encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(WIDTH, 61)
        self.weights = weights

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=self.weights)[0]
        logits = self.head(self.encoder(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


def layers(core: str, kind: str = "plain", model: type[Layers] = Layers, **more: Any) -> Any:
    return functools.partial(model, core, kind, **more)


def inputs(length: int = 19) -> Callable[[], Mapping[str, Any]]:
    return functools.partial(_inputs, length)


def _inputs(length: int) -> Mapping[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {"ids": torch.randint(0, 61, (2, length), generator=generator)}
