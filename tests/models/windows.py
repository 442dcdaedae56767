"""Models whose attention is local: windows, shifted, looking back, sliding; importable by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.models.grids import HEADS, HIDDEN, Weights, attend

__all__ = ["IMAGES", "WINDOWS", "Windows", "inputs"]

Tensor = torch.Tensor
SIZE = 4
"""Tokens of a window, or of a side of one."""


class Windows(nn.Module):
    """Two layers of a construct under test on [batch, tokens, hidden], or on an image."""

    def __init__(self, construct: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.construct = construct
        self.first, self.second = Weights(), Weights()
        self.table = nn.Parameter(torch.randn(HEADS, (2 * SIZE - 1) ** 2) * 0.5)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        layer = WINDOWS[self.construct]
        x = layer(self, self.first, x)
        result: Tensor = self.out(layer(self, self.second, x.tanh()))
        return result


def apart(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows of tokens, each attending by itself."""
    b, s, d = x.shape
    return attend(w.rows, x.reshape(-1, SIZE, d)).view(b, s, d) + w.gate(x).tanh()


def with_last(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows, and the last token of the last one."""
    y = apart(m, w, x)
    return y + y[:, -1, None].tanh()


def causal(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows of tokens in five dimensions, causal inside."""
    b, s, d = x.shape
    q, k, v = (
        y.view(b, s // SIZE, SIZE, HEADS, -1).transpose(2, 3) for y in w.rows(x).chunk(3, -1)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + y.transpose(2, 3).reshape(b, s, d)


def shifted(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows, then windows shifted by half of one, going round."""
    x = apart(m, w, x)
    return apart(m, w, x.roll(-SIZE // 2, 1)).roll(SIZE // 2, 1)


def strided(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Every nth token together (the grid attention of MaxViT), after windows."""
    x = apart(m, w, x)
    b, s, d = x.shape
    y = x.view(b, SIZE, s // SIZE, d).transpose(1, 2).reshape(-1, SIZE, d)
    return attend(w.cols, y).view(b, s // SIZE, SIZE, d).transpose(1, 2).reshape(b, s, d)


def look_back(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Blocks that read themselves and the block before, causally."""
    b, s, d = x.shape
    q, k, v = (y.view(b, s // SIZE, SIZE, d) for y in w.rows(x).chunk(3, -1))
    k, v = (torch.cat([F.pad(y, (0, 0, 0, 0, 1, -1)), y], 2) for y in (k, v))
    places = torch.arange(SIZE)[:, None] + SIZE - torch.arange(2 * SIZE)[None]
    first = (torch.arange(s // SIZE) == 0)[:, None, None] & (torch.arange(2 * SIZE) < SIZE)
    keep = (places >= 0) & ~first
    scores = (q @ k.mT / 3).masked_fill(~keep, -1e9)
    return x + (scores.softmax(-1) @ v).reshape(b, s, d)


def look_around(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Blocks that read both neighbours, padded with a number that hides them (local-attention)."""
    b, s, d = x.shape
    n = s // SIZE
    q, k, v = (y.view(b, n, SIZE, d) for y in w.rows(x).chunk(3, -1))
    at = torch.arange(s).view(1, n, SIZE)

    def around(y: Tensor, fill: float) -> Tensor:
        pads = (0, 0) * (y.dim() - 2) + (1, 1)
        padded = F.pad(y, pads, value=fill)
        return torch.cat([padded[:, i : i + n] for i in range(3)], 2)

    k, v, seen = around(k, -1.0), around(v, -1.0), around(at, -1)
    scores = torch.einsum("bnid,bnjd->bnij", q, k) / 3
    scores = scores.masked_fill(seen[:, :, None] == -1, -torch.finfo(scores.dtype).max)
    return x + torch.einsum("bnij,bnjd->bnid", scores.softmax(-1), v).reshape(b, s, d)


def unfolded(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Blocks that read both neighbours, which are unfolded from padded tokens (Longformer)."""
    b, s, d = x.shape
    n = s // SIZE
    q, k, v = w.rows(x).chunk(3, -1)
    k, v = (F.pad(y, (0, 0, SIZE, SIZE)).unfold(1, 3 * SIZE, SIZE) for y in (k, v))
    queries = torch.arange(s).view(n, SIZE, 1)
    keys = (torch.arange(n)[:, None] * SIZE - SIZE + torch.arange(3 * SIZE))[:, None]
    near = (keys >= 0) & (keys < s) & ((queries - keys).abs() <= SIZE)
    scores = (q.view(b, n, SIZE, d) @ k / 3).masked_fill(~near, -torch.inf)
    return x + (scores.softmax(-1) @ v.mT).reshape(b, s, d)


def random_blocks(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Blocks that read their neighbours, the first block and one of a table (BigBird)."""
    b, s, d = x.shape
    n = s // SIZE
    q, k, v = (y.view(b, n, SIZE, d) for y in w.rows(x).chunk(3, -1))
    drawn = torch.tensor([(5 * i + 3) % n for i in range(n)])
    k, v = (
        torch.cat([y[:, :1].expand_as(y), y.roll(1, 1), y, y.roll(-1, 1), y[:, drawn]], 2)
        for y in (k, v)
    )
    return x + ((q @ k.mT / 3).softmax(-1) @ v).reshape(b, s, d)


def banded(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """A mask of a band over all tokens."""
    far = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
    return attend(w.rows, x, attn_mask=far <= 2)


def neighbourhoods(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Each token reads the tokens around it, which are unfolded for it."""
    q, k, v = w.rows(x).chunk(3, -1)
    k, v = (F.pad(y, (0, 0, 2, 2)).unfold(1, 5, 1) for y in (k, v))
    weights = (q[:, :, None] @ k / 3).softmax(-1)
    return x + (weights @ v.mT)[:, :, 0]


def taps(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Each token reads those around it, stacked of shifted copies."""
    q, k, v = w.rows(x).chunk(3, -1)
    s = x.shape[1]
    k, v = (
        torch.stack([F.pad(y, (0, 0, 1, 1))[:, i : i + s] for i in range(3)], 2) for y in (k, v)
    )
    weights = torch.einsum("bsd,bsjd->bsj", q, k).softmax(-1)
    return x + torch.einsum("bsj,bsjd->bsd", weights, v)


def chunked(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Overlapping chunks of two windows, whose products are put together (Longformer)."""
    b, s, d = x.shape
    q, k, v = w.rows(x).chunk(3, -1)
    n = s // SIZE - 1

    def chunks(y: Tensor) -> Tensor:
        size = [b, n, 2 * SIZE, d]
        stride = [s * d, SIZE * d, d, 1]
        return y.contiguous().as_strided(size, stride)

    scores = torch.einsum("bnid,bnjd->bnij", chunks(q), chunks(k)) / 3
    y = scores.softmax(-1) @ chunks(v)
    total = torch.zeros_like(x)
    total = total + F.pad(y[:, :, :SIZE].reshape(b, -1, d), (0, 0, 0, SIZE))
    return x + total + F.pad(y[:, :, SIZE:].reshape(b, -1, d), (0, 0, SIZE, 0))


def padded(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Tokens padded to whole windows, the padding hidden."""
    b, s, d = x.shape
    more = -s % SIZE
    y = F.pad(x, (0, 0, 0, more))
    keep = (torch.arange(s + more) < s).view(-1, 1, 1, SIZE)
    keep = keep.repeat(b, 1, 1, 1)
    return attend(w.rows, y.reshape(-1, SIZE, d), attn_mask=keep).view(b, -1, d)[:, :s]


def cut(x: Tensor) -> Tensor:
    """[B, H, W, D] -> [B windows, SIZE SIZE, D]."""
    b, h, w, d = x.shape
    x = x.view(b, h // SIZE, SIZE, w // SIZE, SIZE, d)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, SIZE * SIZE, d)


def joined(y: Tensor, like: Tensor) -> Tensor:
    b, h, w, d = like.shape
    y = y.view(b, h // SIZE, w // SIZE, SIZE, SIZE, d)
    return y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, d)


def image(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows of an image with a bias by distance (Swin)."""
    return joined(attend(w.rows, cut(x), attn_mask=distances(m)), x) + w.gate(x).tanh()


def distances(m: Windows) -> Tensor:
    at = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    far = at.flatten(1)[:, :, None] - at.flatten(1)[:, None] + SIZE - 1
    return m.table[:, far[0] * (2 * SIZE - 1) + far[1]][None]


def shifted_image(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows of a rolled image, in which far places hide from each other (Swin)."""
    x = image(m, w, x)
    b, h, wide, _ = x.shape
    part = torch.zeros(1, h, wide, 1)
    for i, rows in enumerate((slice(0, -SIZE), slice(-SIZE, -2), slice(-2, None))):
        for j, columns in enumerate((slice(0, -SIZE), slice(-SIZE, -2), slice(-2, None))):
            part[:, rows, columns] = 3 * i + j
    parts = cut(part)[..., 0]
    hidden = (parts[:, None] != parts[:, :, None]).to(x.dtype) * -100.0
    mask = distances(m) + hidden.repeat(b, 1, 1)[:, None]
    y = x.roll((-2, -2), (1, 2))
    y = joined(attend(w.cols, cut(y), attn_mask=mask), y)
    return y.roll((2, 2), (1, 2))


def with_all(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows of an image, then all of its tokens (SAM's encoder)."""
    x = image(m, w, x)
    return attend(w.cols, x.flatten(1, 2)).view_as(x)


def blocks_and_grid(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows of an image, then places that lie evenly over it (MaxViT)."""
    x = image(m, w, x)
    b, h, wide, d = x.shape
    y = x.view(b, SIZE, h // SIZE, SIZE, wide // SIZE, d).permute(0, 2, 4, 1, 3, 5)
    z = attend(w.cols, y.reshape(-1, SIZE * SIZE, d)).view(y.shape)
    return z.permute(0, 3, 1, 4, 2, 5).reshape(b, h, wide, d)


def by_product(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Windows of an image, written as products, one head."""
    q, k, v = w.rows(cut(x)).chunk(3, -1)
    return joined((q @ k.mT / 3).softmax(-1) @ v, x) + x


def pooled_queries(m: Windows, w: Weights, x: Tensor) -> Tensor:
    """Every window asks what overlapping pools make of the whole image (GC ViT)."""
    b, h, wide, _ = x.shape
    steps = (h // SIZE, wide // SIZE)
    few = F.max_pool2d(x.permute(0, 3, 1, 2), [n + 1 for n in steps], steps, 1)
    windows = cut(x)
    q = w.gate(few.flatten(2).mT).repeat_interleave(len(windows) // b, 0)
    _, k, v = w.rows(windows).chunk(3, -1)
    return joined((q @ k.mT / 3).softmax(-1) @ v, x) + x


IMAGES = ("image", "shifted image", "with all", "blocks and grid", "by product", "pooled queries")
WINDOWS: Mapping[str, Callable[..., Tensor]] = {
    "apart": apart,
    "with last": with_last,
    "causal": causal,
    "shifted": shifted,
    "strided": strided,
    "look back": look_back,
    "look around": look_around,
    "unfolded": unfolded,
    "random blocks": random_blocks,
    "banded": banded,
    "neighbourhoods": neighbourhoods,
    "taps": taps,
    "chunked": chunked,
    "padded": padded,
    "image": image,
    "shifted image": shifted_image,
    "with all": with_all,
    "blocks and grid": blocks_and_grid,
    "by product": by_product,
    "pooled queries": pooled_queries,
}


def inputs(construct: str, windows: int, batch: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(windows)
    more = -1 if construct == "padded" else 0
    shape: tuple[int, ...] = (windows * SIZE + more,)
    if construct in IMAGES:
        shape = (windows * SIZE, 2 * SIZE)
    return (torch.randn(batch, *shape, HIDDEN, generator=generator),)
