"""A Hugging Face Llama split over ranks equals the stock model: loss, outputs, every gradient.

The oracle is the stock model in eager mode on the whole sequence; the bounds are the harness's:
float32 1e-6 for the loss and 1e-4 for gradients, float64 1e-10 (tests/support/harness.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.end_to_end.models import (
    llama,
    padded_tokens,
    tokens,
    tokens_and_labels,
    with_ignored_labels,
)
from tests.support.harness import Case, RankPool, compare_all, compare_here

pytestmark = pytest.mark.ranks

STRATEGIES = ("simple", "collective", "production", "auto")
LAYERS = 2
F64 = torch.float64


def case(strategy: str, model: Any, inputs: Any, label: str, **more: Any) -> Case:
    options = {"strategy": strategy, "compiler": "eager"} | more.pop("options", {})
    return Case(model=model, inputs=inputs, options=options, label=f"{label}, {strategy}", **more)


def check(pool: RankPool, cases: list[Case]) -> None:
    for found, wanted in zip(compare_all(pool, cases), cases, strict=True):
        # HF computes its loss, and so the loss among the outputs, in float32 whatever the model's
        # dtype; gradients in float64 are held to 1e-10 all the same.
        found.check(loss=1e-6, outputs=1e-6 if wanted.dtype == torch.float64 else None)
        strategy = wanted.options["strategy"]
        assert len(found.strategies) == LAYERS, found.ranks[0].plan
        if strategy != "auto":
            assert set(found.strategies) == {strategy}, found.ranks[0].plan


EVEN_AND_UNEVEN = ((256, 1), (251, 2))
OTHERS = ((256, 2), (251, 1))


def lengths_and_batches(strategy: str, chosen: Sequence[tuple[int, int]]) -> list[Case]:
    return [
        case(strategy, llama(), tokens_and_labels(seq_len, batch), f"S={seq_len} B={batch}")
        for seq_len, batch in chosen
    ]


@pytest.mark.slow  # on three ranks below
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_two_ranks_at_even_and_uneven_lengths(ranks2: RankPool, strategy: str) -> None:
    check(ranks2, lengths_and_batches(strategy, EVEN_AND_UNEVEN))


@pytest.mark.parametrize(
    "strategy", ["auto", *(pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES[:-1])]
)
def test_on_three_ranks_at_even_and_uneven_lengths(ranks3: RankPool, strategy: str) -> None:
    check(ranks3, lengths_and_batches(strategy, EVEN_AND_UNEVEN))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_the_other_lengths_and_batches(
    ranks2: RankPool, ranks3: RankPool, strategy: str
) -> None:
    check(ranks2, lengths_and_batches(strategy, OTHERS))
    check(ranks3, lengths_and_batches(strategy, OTHERS))


@pytest.mark.slow
def test_on_four_ranks(ranks4: RankPool) -> None:
    check(ranks4, [case(s, llama(), tokens_and_labels(61), "S=61") for s in STRATEGIES])


@pytest.mark.slow  # tests/ops and test_plain.py exchange them too
def test_heads_are_exchanged_where_they_divide(ranks2: RankPool, ranks3: RankPool) -> None:
    inputs = tokens_and_labels(251, 2)
    check(ranks2, [case("ulysses", llama(), inputs, "4 heads, 2 ranks")])
    three = llama(num_attention_heads=6, num_key_value_heads=3)
    check(ranks3, [case("ulysses", three, inputs, "6 heads, 3 ranks")])


def equal_sizes(strategy: str) -> list[Case]:
    """Token counts that equal other sizes: nothing may be told apart by size."""
    size = 64
    everything = llama(hidden_size=size, vocab_size=size, head_dim=size, intermediate_size=size)
    chosen = {
        "S = hidden": llama(hidden_size=size),
        "S = vocabulary": llama(vocab_size=size),
        "S = head dim": llama(head_dim=size),
        "S = everything": everything,
    }
    return [
        case(strategy, model, tokens_and_labels(size, 2, vocab=size), label)
        for label, model in chosen.items()
    ]


@pytest.mark.slow  # in test_token_axes.py too
def test_when_the_length_equals_another_size(ranks2: RankPool, ranks3: RankPool) -> None:
    check(ranks2, equal_sizes("auto"))
    check(ranks3, [equal_sizes(strategy)[-1] for strategy in STRATEGIES])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[:-1])
def test_when_the_length_equals_another_size_in_a_strategy_by_name(
    ranks2: RankPool, strategy: str
) -> None:
    check(ranks2, equal_sizes(strategy))


@pytest.mark.slow  # in test_token_axes.py too
def test_when_the_local_length_batch_and_heads_equal_other_sizes(ranks2: RankPool) -> None:
    check(
        ranks2,
        [
            case("auto", llama(hidden_size=32), tokens_and_labels(64), "S/p = hidden"),
            case("auto", llama(), tokens_and_labels(4, 4), "S = B = heads"),
            case("auto", llama(), tokens_and_labels(2, 2), "S = B = ranks = K/V heads", dtype=F64),
        ],
    )


@pytest.mark.slow  # in test_every_length.py too
def test_shorter_than_the_ranks_or_barely_longer(ranks3: RankPool) -> None:
    """In float64: with so few tokens most gradients of queries and keys are zero in theory."""
    lengths = itertools.product((2, 3, 5), ("simple", "auto"))
    check(
        ranks3,
        [case(s, llama(), tokens_and_labels(n, 2), f"S={n}", dtype=F64) for n, s in lengths],
    )


def test_a_single_token(ranks2: RankPool) -> None:
    """It has no next token, so the stock model's own loss is NaN; a loss of the logits is used.

    In float64: with one key the gradients of queries and keys are zero in theory.
    """
    check(ranks2, [case("auto", llama(), one_token, "S=1", loss=mean_square_of_logits, dtype=F64)])


def one_token() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(1, 2)}


def mean_square_of_logits(output: Any) -> torch.Tensor:
    result: torch.Tensor = output.logits.square().mean()
    return result


def test_the_loss_is_a_mean_over_the_tokens_of_all_ranks(ranks3: RankPool) -> None:
    cases = [case(s, llama(), with_ignored_labels(50), "ignored") for s in ("collective", "auto")]
    check(ranks3, cases)


def test_padding_on_either_side_is_never_attended(ranks2: RankPool) -> None:
    check(
        ranks2,
        [
            case(strategy, llama(), padded_tokens(61, left=strategy != "auto"), "padded")
            for strategy in STRATEGIES
        ],
    )


def test_with_the_default_cache_and_repeated_calls(ranks2: RankPool) -> None:
    """``use_cache`` returns K and V of every layer; the second call reuses what was compiled."""
    model = llama(use_cache=True)
    check(ranks2, [case("auto", model, tokens_and_labels(61, 2), "cache", steps=2)])


def test_a_new_length_is_compiled_anew(ranks2: RankPool) -> None:
    check(ranks2, [case("auto", llama(), tokens_and_labels(s), f"S={s}") for s in (24, 25)])


@pytest.mark.slow
def test_with_other_compilers(ranks2: RankPool) -> None:
    check(
        ranks2,
        [
            case(
                s, llama(), tokens_and_labels(61, 2), "aot_eager", options={"compiler": "aot_eager"}
            )
            for s in STRATEGIES
        ],
    )


@pytest.mark.inductor
def test_with_inductor(ranks2: RankPool) -> None:
    """MLPs and the loss in chunks, whose bodies are compiled too; and the logits when touched."""
    inductor = {"compiler": "inductor", "chunks": 12}
    check(ranks2, [case("auto", llama(), tokens_and_labels(61, 2), "inductor", options=inductor)])


@pytest.mark.slow
def test_in_float64_gradients_agree_to_1e_10(ranks2: RankPool, ranks3: RankPool) -> None:
    cases = [case(s, llama(), tokens_and_labels(251, 2), "float64", dtype=F64) for s in STRATEGIES]
    check(ranks2, cases)
    check(ranks3, cases)


def test_at_one_rank_without_a_process_group() -> None:
    """The baseline of every scaling figure: the mask recovered, nothing split."""
    found = compare_here(case("auto", llama(), tokens_and_labels(61, 2), "one rank"))
    found.check()
    assert len(found.strategies) == LAYERS


def test_without_gradients_only_outputs_are_computed(ranks2: RankPool) -> None:
    check(ranks2, [case("auto", llama(), tokens_and_labels(61, 2), "inference", backward=False)])
