"""Modules under torch.func transforms, and flex attention, between two attentions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import attention
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from tests.models.constructs import Around
from tests.models.shapes import HEADS, HIDDEN

__all__ = ["FLEX", "TRANSFORMS", "Flex", "Transformed", "flex_in_eager", "flex_trains"]

Tensor = torch.Tensor
DOCUMENTS = (0, 0, 0, 1, 1, 1, 1)


class Transformed(Around):
    documents: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.register_buffer("documents", torch.tensor(DOCUMENTS))

    def between(self, x: Tensor) -> Tensor:
        return TRANSFORMS[self.name](self, x * self.weight)


def over_rows(m: Transformed, x: Tensor) -> Tensor:
    mapped: Tensor = torch.vmap(lambda row: row * row.mean())(x)
    return mapped


def nested_products(m: Transformed, x: Tensor) -> Tensor:
    def product(row: Tensor, weight: Tensor) -> Tensor:
        return (row @ weight).relu()

    twice = torch.vmap(torch.vmap(product, in_dims=(0, None)), in_dims=(0, None))
    result: Tensor = x + twice(x, x[0].T).mean()
    return result


def writes_inside(m: Transformed, x: Tensor) -> Tensor:
    def write(row: Tensor) -> Tensor:
        y = row * 2
        y[0] = row[1]
        return y.add_(1)

    mapped: Tensor = torch.vmap(write)(x)
    return mapped


def layers_inside(m: Transformed, x: Tensor) -> Tensor:
    mapped: Tensor = torch.vmap(lambda row: F.layer_norm(row, (HIDDEN,)) + row.softmax(0))(x)
    return mapped


def without_gradient(m: Transformed, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.vmap(lambda row: row * row.mean())(x)
    return x * scale


def in_a_checkpoint(m: Transformed, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(lambda y: over_rows(m, y) + m.first(y), x, use_reentrant=False)
    return result


def gradient_inside(m: Transformed, x: Tensor) -> Tensor:
    result: Tensor = torch.func.grad(lambda y: (y**3).sum())(x)
    return result


def gradients_of_rows(m: Transformed, x: Tensor) -> Tensor:
    result: Tensor = torch.vmap(torch.func.grad(lambda row: (row.sin() ** 2).sum()))(x)
    return result


def tangent(m: Transformed, x: Tensor) -> Tensor:
    _, result = torch.func.jvp(torch.sin, (x,), (x * 2,))
    return result  # type: ignore[no-any-return]


def mapped_mask(m: Transformed, x: Tensor) -> Tensor:
    """As Hugging Face combines masks: a function of single indices, mapped four times."""

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        documents: Tensor = torch.ops.aten.index(m.documents, [i])
        return (i >= j) & (documents == torch.ops.aten.index(m.documents, [j]))

    mapped: Callable[..., Tensor] = same
    for place in (3, 2, 1, 0):
        mapped = torch.vmap(mapped, in_dims=tuple(0 if d == place else None for d in range(4)))
    length = x.shape[1]
    mask = mapped(*(torch.arange(n) for n in (x.shape[0], 1, length, length)))
    q = heads_of(x)
    return merged(F.scaled_dot_product_attention(q, q, q, mask))


TRANSFORMS: Mapping[str, Callable[[Transformed, Tensor], Tensor]] = {
    "vmap": over_rows,
    "vmap in vmap": nested_products,
    "writes inside vmap": writes_inside,
    "layers inside vmap": layers_inside,
    "vmap without gradients": without_gradient,
    "vmap in a checkpoint": in_a_checkpoint,
    "a mask by vmap": mapped_mask,
    "torch.func.grad": gradient_inside,
    "vmap of torch.func.grad": gradients_of_rows,
    "torch.func.jvp": tangent,
}


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Flex(Around):
    documents: Tensor
    slopes: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.register_buffer("documents", torch.tensor(DOCUMENTS))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125]))

    def between(self, x: Tensor) -> Tensor:
        q = heads_of(x * self.weight)
        return merged(FLEX[self.name](self, q, heads_of(x * 2), heads_of(x - 1)))


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def late_rows(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The first rows see nothing: they are 0."""
    return (i >= j) & (i > 2)


def blocks(keep: Callable[..., Tensor], q: Tensor, k: Tensor) -> Any:
    return create_block_mask(keep, None, None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=4)


def flex_plain(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(q, k, v)


def flex_causal(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(q, k, v, block_mask=blocks(causal, q, k))


def flex_documents(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    documents = m.documents

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (documents[i] == documents[j])

    return flex_attention(q, k, v, block_mask=blocks(keep, q, k))


def flex_empty_rows(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(q, k, v, block_mask=blocks(late_rows, q, k))


def flex_alibi(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    slopes = m.slopes
    return flex_attention(
        q, k, v, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i),
        block_mask=blocks(causal, q, k),
    )  # fmt: skip


def flex_distance(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s - (i - j).abs() * 0.1)


def flex_soft_cap(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(
        q, k, v, score_mod=lambda s, b, h, i, j: 5 * torch.tanh(s / 5),
        block_mask=blocks(causal, q, k),
    )  # fmt: skip


def flex_grouped(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(
        q, k[:, :1], v[:, :1], enable_gqa=True, scale=0.3, block_mask=blocks(causal, q, k)
    )


def flex_logsumexp(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    out, lse = flex_attention(q, k, v, return_lse=True, block_mask=blocks(causal, q, k))
    return out * lse[..., None]


def flex_shared_mask(m: Flex, q: Tensor, k: Tensor, v: Tensor) -> Any:
    mask = blocks(causal, q, k)
    once: Any = flex_attention(q, k, v, block_mask=mask)
    return once + flex_attention(k, q, v, block_mask=mask)


FLEX: Mapping[str, Callable[[Flex, Tensor, Tensor, Tensor], Any]] = {
    "flex attention": flex_plain,
    "flex, causal": flex_causal,
    "flex, packed documents": flex_documents,
    "flex, rows without a key": flex_empty_rows,
    "flex, ALiBi": flex_alibi,
    "flex, distance": flex_distance,
    "flex, soft cap": flex_soft_cap,
    "flex, grouped heads": flex_grouped,
    "flex, logsumexp read": flex_logsumexp,
    "flex, one mask for two": flex_shared_mask,
}


@contextlib.contextmanager
def flex_in_eager() -> Iterator[None]:
    """Let the oracle compute flex attention by its definition: torch would compile it."""
    module = attention.flex_attention
    before = module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


@contextlib.contextmanager
def flex_trains() -> Iterator[None]:
    """Without torch's check that refuses gradients on CPU, where its kernel has none."""
    module = attention.flex_attention
    before = module._validate_device
    module._validate_device = lambda *tensors: None
    try:
        with flex_in_eager():
            yield
    finally:
        module._validate_device = before
