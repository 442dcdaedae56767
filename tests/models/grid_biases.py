"""Attention over a grid with a bias that each query computes for rows and for columns of keys.

Each function takes a model and q, k, v [B, H, N, d] with the sizes of the grids of queries and of
keys, and gives [B, H, queries, d].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DECOYS", "HIDDEN", "SPELLINGS", "Grid"]

Tensor = torch.Tensor
Sizes = tuple[int, ...]
HIDDEN, HEADS, WIDE, DEEP = 8, 2, 3, 2
DIM, LARGEST = HIDDEN // HEADS, 12


class Grid(nn.Module):
    """[B, high, wide, C]: a projection, attention by name, a layer of each token."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.attend = {**SPELLINGS, **DECOYS}[name]
        self.inp, self.qkv = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out, self.pool = nn.Linear(HIDDEN, HIDDEN), nn.Conv2d(DIM, DIM, 2, 2)
        self.high, self.wide = (nn.Parameter(torch.randn(2 * LARGEST - 1, DIM)) for _ in "hw")
        self.rows, self.columns = (nn.Parameter(torch.randn(LARGEST, DIM)) for _ in "hw")
        self.token = nn.Parameter(torch.randn(1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        batch, high, wide, _ = x.shape
        x = self.inp(x).flatten(1, 2)
        if self.attend in (with_a_token, with_a_token_joined, as_the_nearest, as_the_nearest_two):
            x = torch.cat([self.token.expand(batch, -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attend(self, q, k, v, (high, wide)).transpose(1, 2).flatten(2))


def table(of: Tensor, queries: int, keys: int) -> Tensor:
    """[queries, keys, d] by how far they are from each other."""
    step_q, step_k = max(keys / queries, 1.0), max(queries / keys, 1.0)
    far = torch.arange(queries)[:, None] * step_q - torch.arange(keys)[None] * step_k
    return of[(far + (keys - 1) * step_k).long()]


def terms(m: Grid, q: Tensor, of_q: Sizes, of_k: Sizes) -> tuple[Tensor, Tensor]:
    """[B, H, high, wide, keys' rows] and the same of keys' columns."""
    r = q.unflatten(2, of_q)
    return (
        torch.einsum("byhwc,hkc->byhwk", r, table(m.high, of_q[0], of_k[0])),
        torch.einsum("byhwc,wkc->byhwk", r, table(m.wide, of_q[1], of_k[1])),
    )


def as_a_mask(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Heads in the batch; the bias is given to a call."""
    batch, length = len(q), q.shape[2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    r = q.reshape(-1, *sizes, DIM)
    high = torch.einsum("bhwc,hkc->bhwk", r, table(m.high, sizes[0], sizes[0]))
    wide = torch.einsum("bhwc,wkc->bhwk", r, table(m.wide, sizes[1], sizes[1]))
    bias = (high[:, :, :, :, None] + wide[:, :, :, None, :]).reshape(-1, length, length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(0, (batch, HEADS))


def of_joined_heads(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Made with heads in the batch, read with heads beside it; in windows of one row each."""
    of_window = (1, sizes[1])
    q, k, v = (t.unflatten(2, sizes).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    r = q.reshape(-1, *of_window, DIM)
    high = torch.einsum("bhwc,hkc->bhwk", r, table(m.high, 1, 1))
    wide = torch.einsum("bhwc,wkc->bhwk", r, table(m.wide, sizes[1], sizes[1]))
    bias = high[..., :, None] + wide[..., None, :]
    bias = bias.reshape(len(q), HEADS, sizes[1], sizes[1])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return y.unflatten(0, (-1, sizes[0])).transpose(1, 2).flatten(2, 3)


def in_a_view(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """The scores as [.., high, wide, high, wide]."""
    batch, _, length, _ = q.shape
    high, wide = terms(m, q, sizes, sizes)
    scores = (q * DIM**-0.5) @ k.transpose(-2, -1)
    scores = scores.view(batch, -1, *sizes, *sizes) + high.unsqueeze(-1) + wide.unsqueeze(-2)
    return scores.view(batch, -1, length, length).softmax(-1) @ v


def written_in(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Into the scores, in place."""
    batch, _, length, _ = q.shape
    high, wide = terms(m, q, sizes, sizes)
    scores = (q * DIM**-0.5) @ k.transpose(-2, -1)
    scores[:, :, 0:, 0:] = (
        scores[:, :, 0:, 0:].view(batch, -1, *sizes, *sizes)
        + high.unsqueeze(-1)
        + wide.unsqueeze(-2)
    ).view(batch, -1, length, length)
    return scores.softmax(dim=-1) @ v


def with_a_token(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Behind a token that is in no grid."""
    batch, _, length, _ = q.shape
    high, wide = terms(m, q[:, :, 1:], sizes, sizes)
    scores = (q * DIM**-0.5) @ k.transpose(-2, -1)
    scores[:, :, 1:, 1:] = (
        scores[:, :, 1:, 1:].view(batch, -1, *sizes, *sizes)
        + high.unsqueeze(-1)
        + wide.unsqueeze(-2)
    ).view(batch, -1, length - 1, length - 1)
    return scores.softmax(dim=-1) @ v


def with_a_token_joined(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """The same as a bias, with zeros for the token."""
    high, wide = terms(m, q[:, :, 1:], sizes, sizes)
    bias = (high.unsqueeze(-1) + wide.unsqueeze(-2)).flatten(2, 3).flatten(3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(bias, (1, 0, 1, 0)))


def by_products(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Matrix products in the place of einsum."""
    r, length = q.unflatten(2, sizes), q.shape[2]
    high = r @ table(m.high, sizes[0], sizes[0]).transpose(1, 2)[:, None].squeeze(1).unsqueeze(0)
    turned = r.transpose(2, 3) @ table(m.wide, sizes[1], sizes[1]).mT
    wide = turned.transpose(2, 3)
    bias = high[..., :, None] + wide[..., None, :]
    scores = q @ k.mT * 0.3 + bias.reshape(*q.shape[:2], length, length)
    return scores.softmax(-1) @ v


def by_sums(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Elementwise products, summed."""
    r, length = q.unflatten(2, sizes).unsqueeze(4), q.shape[2]
    high = (r * table(m.high, sizes[0], sizes[0])[:, None]).sum(-1)
    wide = (r * table(m.wide, sizes[1], sizes[1])).sum(-1)
    bias = high[..., :, None] + wide[..., None, :]
    return (q @ k.mT + bias.reshape(*q.shape[:2], length, length)).softmax(-1) @ v


def of_places(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Rows and columns as they are, not how far they are."""
    high = torch.einsum("bhnc,kc->bhnk", q, m.rows[: sizes[0]])
    wide = torch.einsum("bhnc,kc->bhnk", q, m.columns[: sizes[1]])
    bias = (high[..., None] + wide[..., None, :]).flatten(3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def shifted(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Each query's products with all distances, moved so that keys lie below each other."""

    def along(r: Tensor, of: Tensor) -> Tensor:
        *before, length, _ = (r @ of[: 2 * r.shape[-2] - 1].mT).shape
        far = F.pad(r @ of[: 2 * length - 1].mT, (0, 1)).flatten(-2)
        far = F.pad(far, (0, length - 1)).reshape(*before, length + 1, 2 * length - 1)
        return far[..., :length, length - 1 :]

    r = q.unflatten(2, sizes)
    wide = along(r, m.wide)[..., None, :]
    high = along(r.transpose(2, 3), m.high).transpose(2, 3)[..., :, None]
    bias = (high + wide).reshape(*q.shape[:3], -1)
    return (q @ k.mT * 0.5 + bias).softmax(-1) @ v


def of_pooled_keys(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Of each two places of a row of keys the mean."""
    of_k = (sizes[0], sizes[1] // 2)
    k, v = (t.unflatten(2, (*of_k, 2)).mean(4).flatten(2, 3) for t in (k, v))
    high, wide = terms(m, q, sizes, of_k)
    bias = (high.unsqueeze(-1) + wide.unsqueeze(-2)).reshape(*q.shape[:3], -1)
    return (q @ k.mT + bias).softmax(-1) @ v


def in_space_and_time(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Three dimensions: of each row the columns in two."""
    cut = (sizes[0], sizes[1] // 2, 2)
    r = q.unflatten(2, cut)
    time = torch.einsum("bythwc,tkc->bythwk", r, table(m.high, cut[0], cut[0]))
    high = torch.einsum("bythwc,hkc->bythwk", r, table(m.wide, cut[1], cut[1]))
    wide = torch.einsum("bythwc,wkc->bythwk", r, table(m.rows, cut[2], cut[2]))
    bias = time[..., :, None, None] + high[..., None, :, None] + wide[..., None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.reshape(*q.shape[:3], -1))


def softly(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Through a layer that is none of products alone."""
    high, wide = (t.tanh() for t in terms(m, F.normalize(q, dim=-1), sizes, sizes))
    bias = (high.unsqueeze(-1) + wide.unsqueeze(-2)).reshape(*q.shape[:3], -1)
    return (q @ k.mT + bias).softmax(-1) @ v


def columns_first(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """The grid of queries transposed where the bias is made."""
    r = q.unflatten(2, sizes).transpose(2, 3)
    high = torch.einsum("bywhc,hkc->bywhk", r, table(m.high, sizes[0], sizes[0])).transpose(2, 3)
    wide = torch.einsum("bywhc,wkc->bywhk", r, table(m.wide, sizes[1], sizes[1])).transpose(2, 3)
    bias = (high.unsqueeze(-1) + wide.unsqueeze(-2)).flatten(2, 3).flatten(3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


SPELLINGS: Mapping[str, Callable[[Grid, Tensor, Tensor, Tensor, Sizes], Tensor]] = {
    f.__name__: f
    for f in (
        as_a_mask, of_joined_heads, in_a_view,
        written_in, with_a_token, with_a_token_joined, by_products, by_sums,
        of_places, shifted, of_pooled_keys, in_space_and_time, softly, columns_first,
    )
}  # fmt: skip


def of_keys(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Each key computes it for its queries."""
    high, wide = terms(m, k, sizes, sizes)
    bias = (high.unsqueeze(-1) + wide.unsqueeze(-2)).reshape(*k.shape[:3], -1).mT
    return (q @ k.mT + bias).softmax(-1) @ v


def of_the_next_row(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Read at another row than the query's own."""
    high, wide = terms(m, q, sizes, sizes)
    bias = (high.roll(1, 2).unsqueeze(-1) + wide.unsqueeze(-2)).reshape(*q.shape[:3], -1)
    return (q @ k.mT + bias).softmax(-1) @ v


def turned(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Read in the order of columns, which is none of the queries."""
    high, _ = terms(m, q, sizes, sizes)
    bias = high.transpose(2, 3).flatten(2, 3).unsqueeze(-1).expand(*[-1] * 4, sizes[1])
    return (q @ k.mT + bias.flatten(3)).softmax(-1) @ v


def as_the_nearest(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """The token in front has the bias of the grid's first query."""
    high, wide = terms(m, q[:, :, 1:], sizes, sizes)
    bias = (high.unsqueeze(-1) + wide.unsqueeze(-2)).flatten(2, 3).flatten(3)
    nearest = (torch.arange(q.shape[2]) - 1).clamp(0)
    bias = F.pad(bias[:, :, nearest], (1, 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def as_the_nearest_two(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """The same by putting the first row in front."""
    high, wide = terms(m, q[:, :, 1:], sizes, sizes)
    bias = (high.unsqueeze(-1) + wide.unsqueeze(-2)).flatten(2, 3).flatten(3)
    bias = F.pad(torch.cat([bias[:, :, :1], bias], 2), (1, 0))
    return (q @ k.mT + bias).softmax(-1) @ v


def doubled_slice(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """What is written into a slice of the scores is no sum with that slice."""
    high, _ = terms(m, q, sizes, sizes)
    scores = q @ k.mT
    scores[:, :, 1:] = scores[:, :, 1:] * 2 + scores[:, :, :-1].detach() * 0.1
    return (scores + high.flatten(2, 3).mean(-1, keepdim=True)).softmax(-1) @ v


def added_elsewhere(m: Grid, q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """The slice that is added to is another than the one that is written."""
    high, _ = terms(m, q, sizes, sizes)
    scores = q @ k.mT
    scores[:, :, 1:] = scores[:, :, :-1] + high.flatten(2, 3)[:, :, 1:].mean(-1, keepdim=True)
    return scores.softmax(-1) @ v


DECOYS: Mapping[str, Callable[[Grid, Tensor, Tensor, Tensor, Sizes], Tensor]] = {
    f.__name__: f
    for f in (
        of_keys, of_the_next_row, turned, as_the_nearest, as_the_nearest_two, doubled_slice,
        added_elsewhere,
    )
}  # fmt: skip
