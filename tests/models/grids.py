"""Models over grids of tokens: attention along one axis after the other, importable by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["GRIDS", "HEADS", "HIDDEN", "Grid", "inputs"]

Tensor = torch.Tensor
HIDDEN, HEADS = 8, 2


class Grid(nn.Module):
    """Two layers of a construct under test on [batch, rows, columns, hidden], and a projection."""

    def __init__(self, construct: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.construct = construct
        self.first, self.second = Weights(), Weights()
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        layer = GRIDS[self.construct]
        x = layer(self.first, x, *more)
        result: Tensor = self.out(layer(self.second, x.tanh(), *more))
        return result


class Weights(nn.Module):
    """What one layer of any construct is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.cols, self.third = (nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(3))
        self.mixed = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.pair = nn.Linear(HIDDEN, HEADS)
        self.gate = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.few = nn.Parameter(torch.randn(3, HIDDEN))
        for layer in (self.rows, self.cols, self.third):
            nn.init.normal_(layer.weight, std=0.4)


def attend(weights: nn.Linear, x: Tensor, **mask: Any) -> Tensor:
    """x [N, S, hidden]: SDPA over S."""
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in weights(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v, **mask)
    return x + y.transpose(1, 2).flatten(2)


def turns(m: Weights, x: Tensor) -> Tensor:
    """[B R, C], then [B C, R], by reshapes."""
    b, r, c, d = x.shape
    x = attend(m.rows, x.reshape(b * r, c, d)).view(b, r, c, d).transpose(1, 2)
    x = attend(m.cols, x.reshape(b * c, r, d)).view(b, c, r, d).transpose(1, 2)
    return x + m.gate(m.norm(x)).relu()


def modules(m: Weights, x: Tensor) -> Tensor:
    """nn.MultiheadAttention, whose weights both directions share."""
    for _ in range(2):
        y = m.norm(x).flatten(0, 1)
        x = (x + m.mixed(y, y, y, need_weights=False)[0].view_as(x)).transpose(1, 2)
    return x


def five_dimensions(m: Weights, x: Tensor) -> Tensor:
    """SDPA on [B, R, H, C, D]."""
    for weights in (m.rows, m.cols):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(2, 3) for y in weights(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
        x = x.transpose(1, 2)
    return x


def one_head(m: Weights, x: Tensor) -> Tensor:
    """SDPA on [B, R, C, D]: rows stand where heads do."""
    for weights in (m.rows, m.cols):
        q, k, v = weights(x).chunk(3, -1)
        x = (x + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2)
    return x


def written_out(m: Weights, x: Tensor) -> Tensor:
    """Products and softmax by einsum, both axes in place."""
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in m.rows(x).chunk(3, -1))
    scores = torch.einsum("brihd,brjhd->brhij", q, k) / 2
    x = x + torch.einsum("brhij,brjhd->brihd", scores.softmax(-1), v).flatten(3)
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in m.cols(x).chunk(3, -1))
    scores = torch.einsum("bichd,bjchd->bchij", q, k) / 2
    return x + torch.einsum("bchij,bjchd->bichd", scores.softmax(-1), v).flatten(3)


def batched_products(m: Weights, x: Tensor) -> Tensor:
    """bmm on [B R H, C, D]."""
    for weights in (m.rows, m.cols):
        b, r, c, d = x.shape
        q, k, v = (
            y.view(b, r, c, HEADS, -1).transpose(2, 3).reshape(b * r * HEADS, c, -1)
            for y in weights(x).chunk(3, -1)
        )
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1), v)
        y = y.view(b, r, HEADS, c, -1).transpose(2, 3).reshape(b, r, c, d)
        x = (x + y).transpose(1, 2)
    return x


def video(m: Weights, x: Tensor) -> Tensor:
    """Tokens of all frames in one dimension; places of a frame, then each place in time."""
    b, f, s, d = x.shape
    tokens = x.flatten(1, 2)
    tokens = attend(m.rows, tokens.view(b * f, s, d)).view(b, f * s, d)
    tokens = tokens + m.gate(m.norm(tokens)).tanh()
    y = tokens.view(b, f, s, d).permute(0, 2, 1, 3).reshape(b * s, f, d)
    y = attend(m.cols, y, is_causal=True).view(b, s, f, d).permute(0, 2, 1, 3)
    return y.reshape(b, f * s, d).view(b, f, s, d)


def channels_first(m: Weights, x: Tensor) -> Tensor:
    """[B, D, R, C], as images are."""
    x = x.permute(0, 3, 1, 2)
    b, d, r, c = x.shape
    y = attend(m.rows, x.permute(0, 2, 3, 1).reshape(b * r, c, d))
    x = y.reshape(b, r, c, d).permute(0, 3, 1, 2)
    y = attend(m.cols, x.permute(0, 3, 2, 1).reshape(b * c, r, d))
    x = y.reshape(b, c, r, d).permute(0, 3, 2, 1)
    return x.permute(0, 2, 3, 1)


def grid_first(m: Weights, x: Tensor) -> Tensor:
    """[R, C, B, D], as fairseq's: the axis that attends comes first."""
    x = x.permute(1, 2, 0, 3)
    for weights in (m.rows, m.cols):
        r, c, b, d = x.shape
        y = x.reshape(r, c * b, d).transpose(0, 1)
        x = attend(weights, y).transpose(0, 1).view(r, c, b, d).transpose(0, 1)
    return x.permute(2, 0, 1, 3)


def padded_rows(m: Weights, x: Tensor, lengths: Tensor) -> Tensor:
    """Each row has a length of its own; keys beyond it are hidden along rows."""
    b, r, c, d = x.shape
    keep = torch.arange(c, device=x.device) < lengths.view(b, r, 1)
    mask = keep.view(b * r, 1, 1, c)
    x = attend(m.rows, x.reshape(b * r, c, d), attn_mask=mask).view(b, r, c, d).transpose(1, 2)
    mask = keep.transpose(1, 2).reshape(b * c, 1, 1, r) | torch.eye(r, dtype=torch.bool)
    x = attend(m.cols, x.reshape(b * c, r, d), attn_mask=mask)
    return x.view(b, c, r, d).transpose(1, 2)


def row_bias(m: Weights, x: Tensor) -> Tensor:
    """A bias that each row computes for its own pairs of columns."""
    b, r, c, d = x.shape
    own = m.gate(x) @ x.transpose(-1, -2)
    y = attend(m.rows, x.reshape(b * r, c, d), attn_mask=own.view(b * r, 1, c, c))
    y = y.view(b, r, c, d).transpose(1, 2).reshape(b * c, r, d)
    return attend(m.cols, y).view(b, c, r, d).transpose(1, 2)


def pair_bias(m: Weights, x: Tensor, pairs: Tensor) -> Tensor:
    """Sequences by residues, with a bias of residue pairs that all rows share (Evoformer)."""
    b, r, c, d = x.shape
    bias = m.pair(pairs).permute(0, 3, 1, 2)[:, None]
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(2, 3) for y in m.rows(x).chunk(3, -1))
    scores = (q @ k.mT / 2 + bias).softmax(-1)
    x = x + (scores @ v).transpose(2, 3).flatten(3) * m.gate(x).sigmoid()
    return attend(m.cols, x.transpose(1, 2).reshape(b * c, r, d)).view(b, c, r, d).transpose(1, 2)


def triangles(m: Weights, x: Tensor) -> Tensor:
    """Pairs of residues: attention around the first node, then around the second (Evoformer)."""
    for weights in (m.rows, m.cols):
        bias = m.pair(m.norm(x)).permute(0, 3, 1, 2)[:, None]
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(2, 3) for y in weights(x).chunk(3, -1))
        y = ((q @ k.mT / 2 + bias).softmax(-1) @ v).transpose(2, 3).flatten(3)
        x = (x + y * m.gate(x).sigmoid()).transpose(1, 2)
    return x


def outer_products(m: Weights, x: Tensor) -> Tensor:
    """Pairs of columns: the mean over rows of their outer products (Evoformer)."""
    x = turns(m, x)
    pairs = torch.einsum("bric,brjd->bijcd", x[..., :2], x[..., 2:4]).flatten(-2) / x.shape[1]
    return x + F.pad(pairs.tanh().mean(2), (0, x.shape[-1] - 4))[:, None]


def table(m: Weights, x: Tensor) -> Tensor:
    """Features of each item, then items, which read those whose labels are known (TabPFN)."""
    b, n, f, d = x.shape
    x = attend(m.rows, x.reshape(b * n, f, d)).view(b, n, f, d)
    y = x.transpose(1, 2).reshape(b * f, n, d)
    q, k, v = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in m.cols(y).chunk(3, -1))
    known = (2 * n + 2) // 3
    y = F.scaled_dot_product_attention(q, k[:, :, :known], v[:, :, :known])
    return x + y.transpose(1, 2).flatten(2).view(b, f, n, d).transpose(1, 2)


def routers(m: Weights, x: Tensor) -> Tensor:
    """Along time, then variables by way of a few routers (Crossformer)."""
    b, v, t, d = x.shape
    x = attend(m.rows, x.reshape(b * v, t, d)).view(b, v, t, d)
    y = x.transpose(1, 2).reshape(b * t, v, d)
    routers = m.few.expand(b * t, -1, -1)
    read = m.mixed(routers, y, y, need_weights=False)[0]
    y = y + m.mixed(y, read, read, need_weights=False)[0]
    return y.view(b, t, v, d).transpose(1, 2)


def three_axes(m: Weights, x: Tensor) -> Tensor:
    """[B, T, R, C] of two planes: attention along each axis."""
    x = torch.stack([x, x.tanh(), x.sin()], 1)
    for weights in (m.rows, m.cols, m.third):
        shape = x.shape
        x = attend(weights, x.flatten(0, 2)).view(shape).permute(0, 3, 1, 2, 4)
    result: Tensor = x.mean(1) if x.shape[1] == 3 else x.sum(1)
    return result


def dropped(m: Weights, x: Tensor) -> Tensor:
    """Some of the weights of both directions are dropped."""
    b, r, c, d = x.shape
    x = attend(m.rows, x.reshape(b * r, c, d), dropout_p=0.3).view(b, r, c, d).transpose(1, 2)
    x = attend(m.cols, x.reshape(b * c, r, d), dropout_p=0.3).view(b, c, r, d).transpose(1, 2)
    return x


def with_all(m: Weights, x: Tensor) -> Tensor:
    """Along rows, along columns, and all tokens together."""
    b, r, c, d = x.shape
    x = turns(m, x)
    return attend(m.third, x.reshape(b, r * c, d)).view(b, r, c, d)


GRIDS: Mapping[str, Callable[..., Tensor]] = {
    "turns": turns,
    "modules": modules,
    "five dimensions": five_dimensions,
    "one head": one_head,
    "written out": written_out,
    "batched products": batched_products,
    "video": video,
    "channels first": channels_first,
    "grid first": grid_first,
    "padded rows": padded_rows,
    "row bias": row_bias,
    "pair bias": pair_bias,
    "triangles": triangles,
    "outer products": outer_products,
    "table": table,
    "routers": routers,
    "three axes": three_axes,
    "with all": with_all,
    "dropped": dropped,
}


def inputs(construct: str, rows: int, columns: int, batch: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows + columns)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if construct == "triangles":
        columns = rows
    x = numbers(batch, rows, columns, HIDDEN)
    if construct == "pair bias":
        return x, numbers(batch, columns, columns, HIDDEN)
    if construct == "padded rows":
        return x, torch.randint(1, columns + 1, (batch, rows), generator=generator)
    return (x,)
