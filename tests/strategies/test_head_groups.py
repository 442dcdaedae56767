"""Heads in as many groups as are asked for: the same results, and so many messages."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import ringfx
from ringfx.comm.stats import snapshot
from ringfx.ops import gather, ring_attention, shard
from ringfx.strategies import STRATEGIES
from tests.end_to_end.models import llama, tokens_and_labels
from tests.support.harness import Case, RankPool, compare_all

pytestmark = pytest.mark.ranks

HEADS, KV_HEADS, LENGTH = 12, 6, 41
IN_GROUPS = ("collective", "production", "ulysses")


def by_hand(name: str, asked: int) -> tuple[float, int]:
    """The largest difference of output and gradients, and the messages that were sent."""
    torch.manual_seed(0)
    given = [
        torch.randn(2, heads, LENGTH, 8, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    weight = torch.randn(2, HEADS, LENGTH, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
    wanted = torch.autograd.grad((expected * weight).sum(), given)
    ringfx.ops.reset_stats()
    parts = [shard(x, 2, layout="zigzag") for x in given]
    strategy = STRATEGIES[name].in_groups(asked)
    out = ring_attention(
        *parts, causal=True, layout="zigzag", length=LENGTH, kv_length=LENGTH, strategy=strategy,
        name="layer",
    )  # fmt: skip
    sent = snapshot()["layer"].messages
    found = gather(out, 2, layout="zigzag", length=LENGTH)
    gradients = torch.autograd.grad((found * weight).sum(), given)
    pairs = zip((found, *gradients), (expected, *wanted), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs), sent


@pytest.mark.parametrize("name", IN_GROUPS)
def test_the_results_are_the_same_and_the_messages_more(ranks3: RankPool, name: str) -> None:
    sent = []
    for asked, groups in ((1, 1), (2, 2), (5, 3 if name != "ulysses" else 4)):
        differences, messages = zip(*ranks3.run(by_hand, name, asked), strict=True)
        assert max(differences) < 1e-12
        sent.append(max(messages) / groups)
    if name != "ulysses":  # whose K/V are in fewer groups than its queries
        assert sent[0] == sent[1] == sent[2]
    assert sent[0] < 2 * sent[1]


def test_asked_of_a_model(ranks2: RankPool) -> None:
    sizes = llama(num_attention_heads=8, num_key_value_heads=4)
    cases = [
        Case(
            model=sizes, inputs=tokens_and_labels(75, 2), label=name,
            options={"strategy": name, "compiler": "eager", "head_groups": 2},
        )
        for name in IN_GROUPS
    ]  # fmt: skip
    for found in compare_all(ranks2, cases):
        found.check()
        assert "in up to 2 groups of heads" in " ".join(found.ranks[0].plan.split())
