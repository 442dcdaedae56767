"""Dropout of attention weights: the same under every split, and of the unsplit model's kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ringfx
from ringfx.ir.plan import Plan
from tests.end_to_end.models import tokens
from tests.support.harness import RankPool, gradient_differences, raises

pytestmark = pytest.mark.ranks

HIDDEN, HEADS, SEQ_LEN = 24, 4, 29
SPLIT: Mapping[str, Any] = {"compiler": "eager", "strategy": "production"}


class Layer(nn.Module):
    """Attention in one of several spellings, and a dropout outside of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.bias = nn.Parameter(torch.randn(HEADS, 2 * SEQ_LEN))
        self.latents = nn.Parameter(torch.randn(1, 5, HIDDEN))
        self.multihead = nn.MultiheadAttention(HIDDEN, HEADS, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "few queries":
            return x + self.pooled(x).mean(1, keepdim=True)
        if self.how == "window":  # the first token is beside
            return torch.cat([x[:, :1], self.attended(x[:, 1:])], 1)
        return self.attended(x)

    def pooled(self, x: Tensor) -> Tensor:
        """Every rank has these queries, and its own keys."""
        q = self.latents.unflatten(-1, (HEADS, -1)).transpose(1, 2).expand(len(x), -1, -1, -1)
        k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)[1:]
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found

    def attended(self, x: Tensor) -> Tensor:
        if self.how == "multihead":
            added: Tensor = self.multihead(x, x, x, need_weights=False)[0]
            return x + added
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.how in ("sdpa", "window"):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2)
        else:
            s = q @ k.mT * q.shape[-1] ** -0.5
            if self.how == "bias":
                at = torch.arange(x.shape[1])
                s = s + self.bias[:, at[None] - at[:, None] + SEQ_LEN]
            mixed = F.dropout(s.softmax(-1), 0.2, self.training) @ v
        return x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), 0.1, self.training)


class Dropping(nn.Module):
    """Two layers, perhaps checkpointed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(96, HIDDEN)
        self.checkpoints = how.startswith("checkpointed ")
        self.layers = nn.ModuleList(Layer(how.removeprefix("checkpointed ")) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        loss: Tensor = x.square().mean()
        return loss


def trained(how: str, options: Mapping[str, Any], length: int = SEQ_LEN) -> dict[str, Tensor]:
    """Losses of two steps in a row, and the sum of their gradients."""
    torch._dynamo.reset()
    model = Dropping(how).double()
    split = ringfx.optimize(model, **{**SPLIT, **options})
    torch.manual_seed(7)
    found = {}
    for step in range(2):
        loss = split(tokens(length, 2, seed=step))
        loss.backward()
        found[f"loss {step}"] = loss.detach()
    plan: Plan = getattr(split, "plan")  # noqa: B009
    assert [layer.kernel for layer in plan.layers] == ["math"] * 2
    assert all("dropout 0.2" in layer.mask for layer in plan.layers)
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def all_trained(cases: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Tensor]]:
    return [trained(how, options) for how, options in cases]


CASES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("sdpa", {"head_groups": 4}), ("sdpa", {"strategy": "simple"}),
    ("sdpa", {"strategy": "collective", "head_groups": 2}), ("sdpa", {"strategy": "ulysses"}),
    ("bias", {"compiler": "aot_eager"}), ("multihead", {}), ("window", {}),
    ("few queries", {}),
    ("checkpointed sdpa", {"compiler": "aot_eager"}),
    ("sdpa", {"compiler": "aot_eager", "recompute": "attention"}),
)  # fmt: skip


def check(by_rank: Sequence[list[dict[str, Tensor]]], cases: Any) -> None:
    """Against one rank, this process."""
    oracles = {how: trained(how, {}) for how in {_uncheckpointed(how) for how, _ in cases}}
    for results in by_rank:
        for (how, options), found in zip(cases, results, strict=True):
            worst = max(gradient_differences(found, oracles[_uncheckpointed(how)]).values())
            assert worst < 1e-10, (how, options)


def _uncheckpointed(how: str) -> str:
    return how.removeprefix("checkpointed ")


def test_two_ranks_drop_what_one_drops(ranks2: RankPool) -> None:
    check(ranks2.run(all_trained, CASES), CASES)


def test_three_ranks_drop_what_one_drops(ranks3: RankPool) -> None:
    cases = (("bias", {"head_groups": 2}),)
    check(ranks3.run(all_trained, cases), cases)


@pytest.mark.slow
def test_four_ranks_drop_what_one_drops(ranks4: RankPool) -> None:
    cases = (CASES[0], CASES[3], ("checkpointed bias", {"compiler": "aot_eager"}))
    check(ranks4.run(all_trained, cases), cases)


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_by_inductor_they_drop_the_same(ranks2: RankPool) -> None:
    """Inductor draws by itself: one rank is compiled by it, too."""
    options = {"compiler": "inductor"}
    oracle = trained("bias", options)
    for found in ranks2.run(trained, "bias", options):
        assert max(gradient_differences(found, oracle).values()) < 1e-10


def seeded_apart() -> None:
    model = ringfx.optimize(Dropping("sdpa"), compiler="eager")
    torch.manual_seed(dist.get_rank())
    model(tokens(SEQ_LEN))


def test_ranks_with_other_seeds_get_an_error(ranks2: RankPool) -> None:
    for text in raises(ranks2, seeded_apart):
        assert text.startswith("AgreementError: ")
        assert "torch.manual_seed" in text
