"""What stands between two attentions: every operator that a model may have there, split or not."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.models.between import HIDDEN, OPERATORS, Between, inputs, loss
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in

SEQ_LEN = 13
"""Odd, so that two ranks pad it."""
IN_A_HURRY = (
    "cumsum", "cumsum of integers", "logcumsumexp", "selective scan", "softmax", "logsumexp",
    "attention pooling", "amax", "max, its place", "argmax", "any", "var_mean", "normalize",
    "quantile", "topk tokens", "argsort", "group norm", "flip", "roll", "pad, circular",
    "repeat_interleave", "unfold", "im2col", "stack", "swapped halves", "triu of pairs",
    "take_along_dim", "index_select", "permuted", "scatter", "scatter_add", "index_add",
    "masked write", "segment_reduce", "depthwise causal conv1d", "conv1d, stride 2",
    "avg_pool1d", "interpolate, linear", "rfft", "stft", "complex rotation",
    "cross entropy, smoothed, weighted", "nll_loss", "nll_loss, sum", "bce with logits, weighted",
    "kl_div, batchmean", "cosine embedding", "ctc", "masked mean", "masked_select",
)  # fmt: skip
"""Those with a row or a decomposition of a kind of their own."""


def case(name: str, causal: bool, seq_len: int) -> Case:
    return Case(
        model=functools.partial(Between, name, causal),
        inputs=functools.partial(inputs, seq_len),
        loss=loss,
        dtype=torch.float64,
        options={"compiler": "eager", "on_unsupported": "gather"},
        label=f"{name}, {'zigzag' if causal else 'contiguous'}, {seq_len} tokens",
    )


def test_operators_between_attentions_are_right_on_two_ranks(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, [case(name, True, SEQ_LEN) for name in one_in(6, IN_A_HURRY)]):
        found.check()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq_len", [SEQ_LEN, HIDDEN])
@pytest.mark.parametrize("part", range(4))
def test_operators_between_attentions_are_right_on_three_ranks(
    ranks3: RankPool, causal: bool, seq_len: int, part: int
) -> None:
    for found in compare_all(ranks3, [case(n, causal, seq_len) for n in [*OPERATORS][part::4]]):
        found.check()
