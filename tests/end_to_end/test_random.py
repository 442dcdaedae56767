"""Random numbers are the unsplit model's, wherever a model draws them, on every rank."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ringfx
from tests.end_to_end.models import tokens
from tests.support.harness import RankPool, gradient_differences, raises
from tests.support.recorded import recorded

pytestmark = pytest.mark.ranks

HIDDEN = 16
SEQ_LEN = 29

Draws = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Drawing(nn.Module):
    """Embedding, attention, something random, attention again, projection."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.draws = draws
        self.embed = nn.Embedding(96, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq_len, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, 2, HIDDEN // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, seq_len, HIDDEN)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = self.draws(self, x + self.attend(x))
        loss: torch.Tensor = self.out(x + self.attend(x)).square().mean()
        return loss


def dropout(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.3)


def dropout_in_other_layouts(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A generator follows the memory, not the dimensions."""
    turned = F.dropout(x.transpose(0, 1) * 2, 0.3).transpose(0, 1)
    flat = F.dropout(x.flatten(0, 1), 0.5).view(x.shape)
    heads = F.dropout(x.unflatten(-1, (2, -1)).transpose(1, 2), 0.2).transpose(1, 2).flatten(2)
    return turned + flat + heads


def dropout_recomputed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = checkpoint(_two_dropouts, x, use_reentrant=False)
    return F.dropout(result, 0.5)


def _two_dropouts(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(torch.tanh(F.dropout(x, 0.3)), 0.1)


def noise(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x) + torch.rand_like(x, dtype=torch.float32)


def noise_by_shape(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn(x.shape, dtype=x.dtype) * torch.rand(x.shape[1], 1)


def masked_tokens(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    keep = torch.full(x.shape[:2], 0.8, dtype=x.dtype).bernoulli_(0.8)
    return x * keep[..., None] * torch.bernoulli(torch.full_like(x, 0.5))


def drawn_in_place(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + torch.empty_like(x).uniform_(-1, 1) + torch.zeros_like(x).normal_()


def drawn_whole_numbers(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``random_(from, to)`` is an overload that is named like a keyword of Python."""
    small = torch.empty_like(x).random_(-2, 3) + torch.empty_like(x).random_(4)
    return x + small + torch.empty_like(x).geometric_(0.4) * torch.empty_like(x).cauchy_().sign()


def drawn_by_probability(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    keep = torch.empty_like(x).bernoulli_(x.detach().sigmoid())
    return x * keep * x.new_empty(x.shape).log_normal_(0, 0.3)


def one_path_a_sample(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Stochastic depth: the mask has no tokens."""
    return x + torch.tanh(x) * (torch.rand(x.shape[0], 1, 1) < 0.5)


def whole_channels(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.dropout1d(x.transpose(1, 2), 0.5).transpose(1, 2)


def never_read(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    F.dropout(x, 0.5)
    torch.randn_like(x)
    return F.dropout(x, 0.5)


def all_dropped(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 1.0) + F.dropout(x, 0.5)


DRAWS: Mapping[str, Draws] = {
    f.__name__: f
    for f in (
        dropout, dropout_in_other_layouts, noise, noise_by_shape, masked_tokens, drawn_in_place,
        drawn_whole_numbers, drawn_by_probability,
        one_path_a_sample, whole_channels, never_read, all_dropped, dropout_recomputed,
    )
}  # fmt: skip


def stepped(model: nn.Module, owner: nn.Module) -> list[torch.Tensor]:
    """Losses of three steps in a row, gradients summed, and the generator afterwards."""
    torch.manual_seed(11)
    losses = []
    for seed in range(3):
        loss = model(tokens(SEQ_LEN, 2, seed=seed))
        loss.backward()
        losses.append(loss.detach())
    return [*losses, torch.get_rng_state()]


def compared(name: str, compiler: Any) -> tuple[float, float, bool, Counter[str]]:
    """Differences of losses and gradients, whether generators agree, and the messages sent."""
    torch._dynamo.reset()
    stock = Drawing(DRAWS[name]).double()
    source = copy.deepcopy(stock)
    model = ringfx.optimize(source, compiler=compiler, strategy="production")
    *expected, generator = stepped(stock, stock)
    with recorded() as sent:
        *ours, mine = stepped(model, source)
    found = {n: p.grad for n, p in source.named_parameters()}
    wanted = {n: p.grad for n, p in stock.named_parameters()}
    losses = max(float(abs(a - b)) for a, b in zip(ours, expected, strict=True))
    gradients = max(gradient_differences(found, wanted).values())
    return losses, gradients, torch.equal(mine, generator), Counter(sent)


def all_compared(
    names: Sequence[str], compiler: str
) -> dict[str, tuple[float, float, bool, Counter[str]]]:
    return {name: compared(name, compiler) for name in names}


def test_random_numbers_are_those_of_the_unsplit_model(ranks3: RankPool) -> None:
    check(ranks3.run(all_compared, tuple(DRAWS), "eager"))


def test_a_recomputed_block_draws_the_same_numbers_again(ranks2: RankPool) -> None:
    names = ("dropout_in_other_layouts", "dropout_recomputed", "noise")
    check(ranks2.run(all_compared, names, "aot_eager"))


def check(by_rank: Sequence[dict[str, tuple[float, float, bool, Counter[str]]]]) -> None:
    for results in by_rank:
        for name, (losses, gradients, same_generator, _) in results.items():
            assert losses < 1e-12, name
            assert gradients < 1e-12, name
            assert same_generator, name


def test_no_activation_is_gathered_for_random_numbers(ranks2: RankPool) -> None:
    for _, _, _, sent in ranks2.run(compared, "dropout_in_other_layouts", "eager"):
        assert sent["all_gather"] == 0
        assert sent["hop"] > 0


def with_other_seeds(draws: Draws) -> None:
    model = ringfx.optimize(Drawing(draws), compiler="eager")
    torch.manual_seed(dist.get_rank())
    model(tokens(SEQ_LEN))


def test_ranks_with_other_seeds_get_an_error_if_the_model_draws(ranks2: RankPool) -> None:
    for text in raises(ranks2, functools.partial(with_other_seeds, dropout)):
        assert text.startswith("AgreementError: ")
        assert "random generator" in text
        assert "torch.manual_seed" in text
    ranks2.run(with_other_seeds, _draws_nothing)


def _draws_nothing(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.tanh()
