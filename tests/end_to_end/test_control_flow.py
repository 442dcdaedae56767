"""Python that asks for numbers in the middle of attention: graphs break there, results do not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.harness import Case, RankPool, compare_all

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor
SEQ_LEN, HIDDEN, HEADS = 13, 16, 2


class Asking(nn.Module):
    """An attention as any other, then one that asks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.kind = kind
        self.first, self.second = (nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.4), requires_grad=False)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = by_heads(self.first(x))
        x = x + merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        q, k, v = by_heads(self.second(x))
        return (x + merged(KINDS[self.kind](self, q, k, v, real))).tanh()


def by_heads(x: Tensor) -> Sequence[Tensor]:
    return torch.unbind(x.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def masked_if_padded(m: Asking, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    scores = q @ k.mT * 0.4
    if not bool(real.all()):
        scores = scores.masked_fill(~real[:, None, None], -math.inf)
    return scores.softmax(-1) @ v


def mask_dropped_if_unpadded(m: Asking, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    mask = real[:, None, None] if real.sum().item() < real.numel() else None
    return F.scaled_dot_product_attention(q, k, v, mask)


def scaled_by_a_number(m: Asking, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return (q @ k.mT * m.scale.item()).softmax(-1) @ v


def as_long_as_is_real(m: Asking, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    longest = int(real.sum(1).max())
    return (q @ k[:, :, :longest].mT).softmax(-1) @ v[:, :, :longest]


def printed(m: Asking, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~real[:, None, None], -math.inf).softmax(-1)
    torch._dynamo.graph_break()
    return weights @ v


@torch.compiler.disable  # type: ignore[untyped-decorator]
def uncompiled(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~real[:, None, None], -math.inf).softmax(-1) @ v


@torch.compiler.disable  # type: ignore[untyped-decorator]
def uncompiled_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


KINDS: Mapping[str, Callable[..., Tensor]] = {
    "a branch between product and softmax": masked_if_padded,
    "a branch before the mask": mask_dropped_if_unpadded,
    "a number as the scale": scaled_by_a_number,
    "a number as the length": as_long_as_is_real,
    "a break before the values": printed,
    "spelled out in an uncompiled function": lambda m, *args: uncompiled(*args),
    "called in an uncompiled function": lambda m, q, k, v, real: uncompiled_call(q, k, v),
}


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, SEQ_LEN, HIDDEN, generator=generator).requires_grad_()
    real = torch.ones(2, SEQ_LEN, dtype=torch.bool)
    real[0, -3:] = False
    return x, real


def loss(output: Tensor) -> Tensor:
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
    return (output * weights).square().sum()


def test_attention_with_a_question_in_it_is_right_on_two_ranks(ranks2: RankPool) -> None:
    cases = [
        Case(
            model=functools.partial(Asking, kind),
            inputs=inputs,
            loss=loss,
            dtype=torch.float64,
            options={"compiler": "eager"},
            label=kind,
        )
        for kind in KINDS
    ]
    for found in compare_all(ranks2, cases):
        found.check()
