"""Scores over images and landmarks: axes of rows and columns whose sizes coincide."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringfx
from ringfx.ir.note import NoteKind, texts_of
from tests.support.harness import Case, RankPool, compare_all

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor
HIDDEN, HEADS = 32, 4


class Decomposed(nn.Module):
    """Positions relative to rows and to columns, as in ViTDet and MViT."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.qkv = (rows, columns), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.row, self.column = (nn.Parameter(torch.randn(2 * n - 1, 8)) for n in self.shape)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.shape
        q, k, v = (
            y.unflatten(-1, (HEADS, 8)).transpose(1, 2).flatten(0, 1)
            for y in self.qkv(x).chunk(3, -1)
        )
        rows, columns = (torch.arange(n)[:, None] - torch.arange(n) + n - 1 for n in self.shape)
        grid = q.view(-1, h, w, 8)
        s = (q @ k.mT).view(-1, h, w, h, w)
        s = s + torch.einsum("bhwc,hkc->bhwk", grid, self.row[rows])[..., :, None]
        s = s + torch.einsum("bhwc,wkc->bhwk", grid, self.column[columns])[..., None, :]
        y = s.view(-1, h * w, h * w).softmax(-1) @ v
        out: Tensor = y.view(x.shape[0], HEADS, h * w, 8).transpose(1, 2).flatten(2)
        return out


class Landmarks(nn.Module):
    """Keys are means over runs of 8 tokens, those of padding left out (Nystromformer)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qk, self.mixed = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, 8)).transpose(1, 2) for y in self.mixed(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        keep = keep[:, None]
        q, k = (
            y.unflatten(-1, (HEADS, 8)).transpose(1, 2) * keep[..., None]
            for y in self.qk(x).chunk(2, -1)
        )
        marks = keep.unflatten(2, (8, 8)).sum(3)
        k = k.unflatten(2, (8, 8)).sum(3) / (marks[..., None] + 1e-8)
        hidden = ~(keep[..., None] * (marks > 0)[..., None, :])
        s = (q @ k.mT).masked_fill(hidden, -torch.finfo(q.dtype).max)
        out: Tensor = (s.softmax(-1) @ k).transpose(1, 2).flatten(2)
        return out


class FiveDims(nn.Module):
    """SDPA over grouped heads; one whose queries and keys have no dims, a mean of values; and one
    of no heads, which computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (2, 2, 8)).permute(0, 2, 3, 1, 4) for y in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y + F.scaled_dot_product_attention(q[..., :0], k[..., :0], v)
        y = y + F.scaled_dot_product_attention(*(z[:, 0, :0] for z in (q, k, v))).sum()
        return y.permute(0, 3, 1, 2, 4).flatten(2)


def image(batch: int, tokens: int) -> tuple[Tensor]:
    return (torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(1)),)


def padded() -> tuple[Tensor, Tensor]:
    keep = torch.arange(64)[None] < torch.tensor([64, 40])[:, None]
    return *image(2, 64), keep


def loss(output: Tensor) -> Tensor:
    return (output * torch.arange(output.numel()).view(output.shape).cos()).square().sum()


def cases() -> list[Case]:
    made = functools.partial(Case, loss=loss, dtype=torch.float64, options={"compiler": "eager"})
    sizes = [(1, 6, 6), (1, 4, 6), (3, 4, 4)]
    return [
        *(
            made(
                model=functools.partial(Decomposed, h, w), label=f"{batch} x {h} x {w}",
                inputs=functools.partial(image, batch, h * w),
            )
            for batch, h, w in sizes
        ),
        made(model=Landmarks, inputs=padded, label="landmarks"),
        made(model=FiveDims, inputs=functools.partial(image, 2, 13), label="five dims"),
    ]  # fmt: skip


def check(pool: RankPool, sites: tuple[int, ...]) -> None:
    for found, number in zip(compare_all(pool, cases()), sites, strict=True):
        found.check(loss=1e-6, outputs=1e-6, gradients=1e-6)
        assert len(found.strategies) == number, found


def test_a_default_device_breaks_no_graph() -> None:
    """Dynamo then looks into torch's own functions, such as ``Tensor.unflatten``."""
    model, inputs = FiveDims(), image(2, 13)
    torch.set_default_device("cpu")
    try:
        plan = ringfx.plan(model, inputs, world_size=2)
    finally:
        torch.set_default_device(None)
    assert len(plan.layers) == 2
    assert not texts_of(plan.notes, NoteKind.GRAPH_BREAK)


def test_axes_of_equal_sizes_are_told_apart_on_two_ranks(ranks2: RankPool) -> None:
    check(ranks2, (1, 1, 1, 2, 2))


@pytest.mark.slow
def test_axes_of_equal_sizes_are_told_apart_on_three_ranks(ranks3: RankPool) -> None:
    check(ranks3, (1, 1, 1, 2, 2))
