"""Numbers trained inside scores: each rank's part of their gradient is summed over the ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.passes.detect.spellings_eager import B, E, H, S, merge, qkv
from tests.passes.detect.spellings_trained import TRAINED, Trained
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor
STRATEGIES = ("simple", "collective", "production", "ulysses")


def is_behind(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


MODIFIED: Mapping[str, Callable[..., Tensor]] = {
    "slope": lambda w, s, b, h, i, j: s - w.alone * (i - j).abs(),
    "slopes": lambda w, s, b, h, i, j: s + w.slopes[h] * (j - i),
    "temperature": lambda w, s, b, h, i, j: s * w.listed[0] + w.gate,
    "cap": lambda w, s, b, h, i, j: w.alone * torch.tanh(s / w.alone),
    "caps": lambda w, s, b, h, i, j: w.slopes[h].exp() * torch.tanh(s / w.slopes[h].exp()),
    "gate": lambda w, s, b, h, i, j: (
        w.gate.sigmoid() * s + (1 - w.gate.sigmoid()) * w.table[i - j + S, h]
    ),
    "power": lambda w, s, b, h, i, j: s.abs() ** w.alone * s.sign(),
    "decay": lambda w, s, b, h, i, j: s * torch.exp(-w.slopes[h] * (i - j).abs()),
}


class Modified(Trained):
    """flex_attention in a program, the same spelled out outside: on a CPU it has no backward."""

    def __init__(self, name: str) -> None:
        super().__init__(functools.partial(modified, MODIFIED[name]))


def projected(w: Trained, y: Tensor) -> Tensor:
    out: Tensor = w.o(merge(y))
    return out


def gated(w: Trained, x: Tensor) -> Tensor:
    """The logsumexp that flex_attention returns, read by a gate."""
    q, k, v = qkv(w, x)
    if torch.compiler.is_compiling():
        y, lse = flex_attention(q, k, v, return_lse=True)
    else:
        s = q @ k.mT * q.shape[-1] ** -0.5
        y, lse = s.softmax(-1) @ v, s.logsumexp(-1)
    return projected(w, y * torch.sigmoid(lse - w.sinks[None, :, None])[..., None])


def modified(change: Callable[..., Tensor], w: Trained, x: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    if torch.compiler.is_compiling():
        mask = create_block_mask(is_behind, None, None, S, S, device="cpu")
        y = flex_attention(q, k, v, functools.partial(change, w), mask)
        return projected(w, y)
    b, h, i, j = (
        torch.arange(n).view([-1 if d == at else 1 for d in range(4)])
        for at, n in enumerate((B, H, S, S))
    )
    s = change(w, q @ k.mT * q.shape[-1] ** -0.5, b, h, i, j)
    return projected(w, s.masked_fill(i < j, -torch.inf).softmax(-1) @ v)


def spelled(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Trained(TRAINED[name])


def flexed(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Modified(name)


def returned(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Trained(gated)


def inputs() -> tuple[Tensor]:
    return (torch.randn(B, S, E, generator=torch.Generator().manual_seed(1)),)


def loss(output: Tensor) -> Tensor:
    return (output * torch.arange(output.numel()).view(output.shape).cos()).square().sum()


def cases(ranks: int, share: int) -> list[Case]:
    models: list[tuple[Any, str]] = [(spelled, name) for name in one_in(share, TRAINED)]
    models.append((returned, "logsumexp"))
    models += [(flexed, name) for name in one_in(share, MODIFIED)]
    usable = STRATEGIES if H % ranks == 0 else STRATEGIES[:3]
    return [
        Case(
            model=functools.partial(model, name), inputs=inputs, loss=loss, dtype=torch.float64,
            options={"compiler": "eager", "strategy": usable[i % len(usable)]},
            label=f"{model.__name__}, {name}, {usable[i % len(usable)]}",
        )
        for i, (model, name) in enumerate(models)
    ]  # fmt: skip


def check(pool: RankPool, made: list[Case]) -> None:
    for found in compare_all(pool, made):
        assert found.output < 1e-6, found
        assert found.gradient < 1e-6, found
        assert all(len(rank.strategies) == 1 for rank in found.ranks), found


def test_trained_numbers_have_their_gradients_on_two_ranks(ranks2: RankPool) -> None:
    check(ranks2, cases(2, 16))


def test_trained_numbers_have_their_gradients_on_three_ranks(ranks3: RankPool) -> None:
    check(ranks3, cases(3, 24))
