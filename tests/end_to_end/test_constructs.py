"""What models do between two attentions: split, or gathered and announced, and always right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.end_to_end.models import tokens
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks

HIDDEN = 16
SEQ_LEN = 31


class Around(nn.Module):
    """Embedding, attention, a construct under test, attention again, projection."""

    def __init__(self, construct: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.construct = construct
        self.embed = nn.Embedding(96, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        nn.init.normal_(self.qkv.weight, std=0.4)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq_len, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, 2, HIDDEN // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, seq_len, HIDDEN)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = CONSTRUCTS[self.construct](self, x + self.attend(x))
        result: torch.Tensor = self.out(x + self.attend(x))
        return result


def changed_in_place(m: Around, x: torch.Tensor) -> torch.Tensor:
    y = x * m.weight
    y += x
    return y.mul_(2)


def recomputed(m: Around, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = checkpoint(lambda a: a + m.attend(a * m.weight), x, use_reentrant=False)
    return result


def without_gradient(m: Around, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        mean = x.mean()
    return x * m.weight * mean


def even_positions(m: Around, x: torch.Tensor) -> torch.Tensor:
    even = torch.arange(x.shape[1]) % 2 == 0
    return torch.where(even[None, :, None], x * m.weight, x)


def difference_of_neighbours(m: Around, x: torch.Tensor) -> torch.Tensor:
    return F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0)) * m.weight + x


def blocks_of_eight(m: Around, x: torch.Tensor) -> torch.Tensor:
    batch, seq_len, hidden = x.shape
    padded = F.pad(x, (0, 0, 0, -seq_len % 8)).view(batch, -1, 8, hidden)
    return padded.mean(2).repeat_interleave(8, 1)[:, :seq_len] * m.weight + x


def causal_convolution(m: Around, x: torch.Tensor) -> torch.Tensor:
    kernel = m.weight.view(-1, 1, 1).expand(-1, 1, 3)
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), kernel, groups=HIDDEN).transpose(1, 2)


def all_pairs(m: Around, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bsh,bth->bst", x, x).tanh() @ x * m.weight


def unit(x: torch.Tensor) -> torch.Tensor:
    """Without an epsilon: a row of zeros, as padding might be, would be NaN."""
    lengths: torch.Tensor = x.norm(dim=-1, keepdim=True)
    return x / lengths


def unit_window(m: Around, x: torch.Tensor) -> torch.Tensor:
    later = unit(m.attend(x[:, 5:])) * m.weight
    return torch.cat([x[:, :5], later], 1)


class Doubled(torch.autograd.Function):
    """Its backward is not its forward's: only one that is kept gives the right gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 3


def own_backward(m: Around, x: torch.Tensor) -> torch.Tensor:
    doubled: torch.Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
    return doubled * m.weight


CONSTRUCTS: Mapping[str, Callable[[Around, torch.Tensor], torch.Tensor]] = {
    "in place": changed_in_place,
    "checkpoint": recomputed,
    "no_grad": without_gradient,
    "detach": lambda m, x: x * m.weight + x.detach(),
    "even positions": even_positions,
    "mean over tokens": lambda m, x: x - x.mean(1, keepdim=True) * m.weight,
    "largest token": lambda m, x: x - x.amax(1, keepdim=True) * m.weight,
    "standard deviation": lambda m, x: x / x.std(1, keepdim=True) * m.weight,
    "softmax over tokens": lambda m, x: x * torch.softmax(x @ m.weight, dim=1)[..., None],
    "last token to all": lambda m, x: x + x[:, -1:] * m.weight,
    "first token to the end": lambda m, x: torch.cat([x[:, 1:], x[:, :1]], 1) * m.weight,
    "neighbours": difference_of_neighbours,
    "running sum": lambda m, x: x.cumsum(1) * m.weight,
    "reversed": lambda m, x: x.flip(1) * m.weight,
    "looked up": lambda m, x: x[:, torch.arange(x.shape[1]).flip(0)] * m.weight,
    "blocks": blocks_of_eight,
    "convolution": causal_convolution,
    "all pairs": all_pairs,
    "own backward": own_backward,
    "unit attention": lambda m, x: unit(m.attend(x)) * m.weight,
    "unit attention over a window": unit_window,
    "unit steps": lambda m, x: x + F.pad(unit(x[:, 1:] - x[:, :-1]), (0, 0, 1, 0)) * m.weight,
}


def only_tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(SEQ_LEN, 2)}


def mean_square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def expected(label: str) -> int:
    return 2 + (label == "checkpoint" or label.startswith("unit attention"))


def test_every_construct_is_right_on_three_ranks(ranks3: RankPool) -> None:
    cases = [
        Case(
            model=functools.partial(Around, name),
            inputs=only_tokens,
            loss=mean_square,
            dtype=torch.float64,
            options={"compiler": "eager"},
            label=name,
        )
        for name in one_in(5, CONSTRUCTS)
    ]
    for found in compare_all(ranks3, cases):
        found.check()
        assert len(found.strategies) == expected(found.label), found.label
