"""Layers of torch itself, as they train and as they run fused in evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.models.shapes import HEADS, HIDDEN, Block

Tensor = torch.Tensor


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.first = Block()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Any:
        x = self.first(x, is_causal=True)
        return self.attention(x, x, x, need_weights=self.need_weights)


class EncoderLayer(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, 40, dropout=0.0, batch_first=True, norm_first=norm_first
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


class EvaluatedLayer(EncoderLayer):
    """In eval and without gradients this is one fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()


class Encoder(nn.Module):
    """Layers of torch itself, with causal or padding masks."""

    def __init__(self, heads: int = 2, padded: bool = False, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, heads, 40, 0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.padded = padded

    def forward(self, x: Tensor) -> Tensor:
        padding = None
        if self.padded:
            padding = torch.arange(x.shape[1])[None] >= torch.tensor([[x.shape[1]], [4]])
        result: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return result


class CausalEncoder(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        result: Tensor = self.encoder(x, mask=mask, is_causal=True)
        return result


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(HIDDEN, HEADS, 40, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.decoder(x, x[:, :5] * 2)
        return result


def evaluated(make: Callable[[], nn.Module]) -> nn.Module:
    return make().eval()


LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "nn.MultiheadAttention": functools.partial(MultiHead, need_weights=False),
    "nn.MultiheadAttention, weights returned": functools.partial(MultiHead, need_weights=True),
    "nn.TransformerEncoder": Encoder,
    "nn.TransformerEncoder, causal": CausalEncoder,
    "nn.TransformerEncoder, padding": functools.partial(Encoder, padded=True),
    "nn.TransformerDecoder": Decoder,
}


EVALUATED: Mapping[str, Callable[[], nn.Module]] = {
    "fused nn.TransformerEncoderLayer": functools.partial(evaluated, Encoder),
    "fused nn.TransformerEncoderLayer, norm first": functools.partial(
        evaluated, functools.partial(Encoder, norm_first=True, activation="gelu")
    ),
    "fused nn.TransformerEncoderLayer, causal": functools.partial(evaluated, CausalEncoder),
    "fused nn.TransformerEncoderLayer, padding": functools.partial(
        evaluated, functools.partial(Encoder, padded=True)
    ),
    "fused nn.MultiheadAttention": functools.partial(
        evaluated, functools.partial(MultiHead, need_weights=False)
    ),
}
