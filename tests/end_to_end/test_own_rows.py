"""Scores with a term that each query makes of itself: every rank makes it for its own queries."""

from __future__ import annotations

import functools

import pytest
import torch

from ringfx.errors import StrategyRefused
from ringfx.ir.note import texts_of
from tests.models import own_rows
from tests.models.own_rows import HIDDEN, TERMS, Rows
from tests.support.harness import Case, RankPool, compare_all
from tests.support.programs import lowered

STRATEGIES = ("simple", "collective", "production")
ELSEWHERE = frozenset({"behind a token", "earlier keys"})
"""Terms that are read at another row than they are made at, and gathered."""


def loss(output: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
    return (output * weights).square().sum()


def case(term: str, causal: bool, seq_len: int, strategy: str) -> Case:
    return Case(
        model=functools.partial(Rows, term, causal),
        inputs=functools.partial(own_rows.inputs, seq_len),
        loss=loss,
        dtype=torch.float64,
        options={"compiler": "eager", "strategy": strategy},
        label=f"{term}, {'zigzag' if causal else 'contiguous'}, {seq_len} tokens, {strategy}",
    )


def cases(seq_len: int, *causal: bool) -> list[Case]:
    return [
        case(term, each, seq_len, STRATEGIES[i % 3])
        for i, term in enumerate(TERMS)
        for each in causal
    ]


@pytest.mark.slow  # on three ranks below
def test_terms_of_a_query_are_right_on_two_ranks(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, cases(13, False, True)):
        found.check()


def test_terms_of_a_query_are_right_on_three_ranks_where_sizes_coincide(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, cases(HIDDEN, True)):
        found.check()


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [4, 5, 6, 7, 8, 24])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_terms_of_a_query_are_right_at_every_length(
    ranks3: RankPool, seq_len: int, strategy: str
) -> None:
    chosen = [case(t, causal, seq_len, strategy) for t in TERMS for causal in (False, True)]
    for found in compare_all(ranks3, chosen):
        found.check()


@pytest.mark.parametrize(("causal", "ranks"), [(False, 2), (True, 8)])
@pytest.mark.parametrize("term", sorted(TERMS.keys() - ELSEWHERE))
def test_nothing_of_all_queries_is_gathered_or_held(term: str, causal: bool, ranks: int) -> None:
    program = lowered(Rows(term, causal), *own_rows.inputs(48), ranks=ranks)
    assert len(program.plan.layers) == 2
    assert [m for m in program.plan.collectives if m.kind == "all_gather"] == []
    assert [n for n in texts_of(program.plan.notes) if "given whole" in n] == []
    values = [n.meta.get("val") for n in program.local.graph_module.graph.nodes]
    longest = 2 * 2 * 48 // ranks * 96  # batch, heads, own queries, distances
    assert max(v.numel() for v in values if isinstance(v, torch.Tensor)) <= longest


def test_ulysses_is_refused_where_each_rank_has_its_own_queries_rows() -> None:
    with pytest.raises(StrategyRefused) as caught:
        lowered(Rows("padded"), *own_rows.inputs(48), ranks=2, strategy="ulysses")
    assert "each rank has only its own queries' rows of the scores" in str(caught.value)
    assert 'use "production" or "collective"' in str(caught.value)
