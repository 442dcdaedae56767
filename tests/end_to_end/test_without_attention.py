"""Models without attention: split along an axis of their inputs, and equal."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from ringfx.errors import AttentionMissed, AttentionNotFound, InvalidArgument
from ringfx.ir.note import NoteKind, texts_of
from ringfx.ir.values import CommKind, Sites
from ringfx.passes import steps
from tests.models.without_attention import (
    FEATURES,
    HIDDEN,
    MODELS,
    TURNED,
    Around,
    ResidualImages,
    StateSpace,
    drawn,
    ids,
)  # fmt: skip
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in
from tests.support.split_here import SplitHere, split_here

WAYS = [(13, 2), (24, 3), (23, 3), (16, 2)]
"""Tokens and ranks."""


def ways(names: Any, name: str) -> list[tuple[int, int]]:
    first = [*names].index(name) % len(WAYS)
    return one_in(len(WAYS), [*WAYS[first:], *WAYS[:first]])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_attention_is_split_and_equal(name: str) -> None:
    model, given = MODELS[name]
    for length, ranks in ways(MODELS, name):
        found = split_here(model(length), (given(length),), ranks)
        assert found.worst < 1e-10, (length, ranks)
        assert found.gathered == []
        assert found.whole == []
        assert found.program.plan.is_split


@pytest.mark.parametrize("name", TURNED)
def test_what_needs_all_tokens_runs_on_whole_rows_of_fewer_channels(name: str) -> None:
    for length, ranks in ways(TURNED, name):
        found = split_here(Around(name), (drawn(2, length, HIDDEN),), ranks)
        assert found.worst < 1e-10, (length, ranks)
        assert turns(found), "it is split by a turn"
        whole = 2 * length * HIDDEN * torch.float64.itemsize
        gathered = [m for m in found.program.plan.collectives if m.kind is CommKind.ALL_GATHER]
        assert all(m.bytes_moved <= whole // 4 for m in gathered), "of a few rows at most"


def turns(found: SplitHere) -> list[tuple[int, bool]]:
    """Bytes of every all-to-all, and whether it runs in backward."""
    moves = found.program.plan.collectives
    return [(m.bytes_moved, m.in_backward) for m in moves if m.kind is CommKind.ALL_TO_ALL]


def test_a_transform_and_its_inverse_take_two_exchanges() -> None:
    """Forward and backward, each of a rank's share: what lies between them stays turned."""
    for length, ranks in ((13, 2), (24, 2)):
        found = split_here(Around("filter"), (drawn(2, length, HIDDEN),), ranks)
        share = 2 * length * HIDDEN * torch.float64.itemsize // ranks
        assert turns(found) == [(share, False), (share, True)] * 2


def test_channels_that_do_not_divide_and_too_few_of_them() -> None:
    assert split_here(Around("filter"), (drawn(2, 12, HIDDEN),), 5).worst < 1e-10
    few = split_here(Around("filter"), (drawn(2, 18, HIDDEN),), 9)
    assert few.worst < 1e-10
    assert few.gathered == ["aten.fft_rfft.default: it transforms the axis"]


def test_a_loop_over_tokens_is_equal() -> None:
    assert split_here(StateSpace(5, loop=True), (ids(5),), 2).worst < 1e-10


@pytest.mark.parametrize("name", FEATURES)
def test_no_features_and_no_batch_are_tokens(name: str) -> None:
    model, given = FEATURES[name]
    with pytest.raises(AttentionNotFound, match="no attention over a sequence was found"):
        ringfx.plan(model(), given, world_size=2)


def test_a_plan_says_what_the_tokens_are_and_how_much_is_split() -> None:
    model, given = MODELS["dilated convolutions"]
    for ranks in (1, 2):
        plan = ringfx.plan(model(40), (given(40),), world_size=ranks)
        (text,) = texts_of(plan.notes, NoteKind.NO_ATTENTION)
        assert text.startswith(
            "no attention was found, so tokens are taken to be dimension 2 of x (40 long)"
        )
        assert ("are split over 2 ranks and 0 B are on each" in text) == (ranks == 2)
        assert [axis.length for axis in plan.axes] == [40]
        assert "40 tokens (tokens)" in str(plan)


def test_of_two_axes_alike_the_first_is_taken_and_the_other_named() -> None:
    plan = ringfx.plan(ResidualImages(0), (drawn(1, 3, 32, 32),), world_size=2)
    (text,) = texts_of(plan.notes, NoteKind.NO_ATTENTION)
    assert "dimension 2 of x (32 long; dimension 3 of x would do as well)" in text


def test_a_user_may_say_what_the_tokens_are() -> None:
    model, x = ResidualImages(0), drawn(1, 3, 32, 48)
    for dim in (2, -1):
        plan = ringfx.plan(model, (x,), world_size=2, token_dims={"x": dim})
        (text,) = texts_of(plan.notes, NoteKind.NO_ATTENTION)
        assert text.startswith(f"tokens are, as was given, dimension {dim % 4} of x (")
        assert plan.axes[0].length * 8 == x.shape[dim], "its strides part it into blocks"
    found = split_here(MODELS["each token"][0](6), (ids(6),), 2, token_dims={"arg5_1": 0})
    assert found.worst < 1e-10
    assert [axis.length for axis in found.program.plan.axes] == [2], "its batch"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"y": 0}, r"no input is called 'y'\. Inputs: x \[1, 3, 32, 48\]"),
        ({"x": 4}, r"x \[1, 3, 32, 48\] has no dimension 4"),
        ({"x": 0}, "dimension 0 of x .* has too few elements for 2 ranks"),
        ({"x": "2"}, "is no mapping from names of inputs to dimensions"),
        (2, "is no mapping from names of inputs to dimensions"),
    ],
)
def test_what_cannot_be_tokens_is_refused(given: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        ringfx.plan(ResidualImages(0), (drawn(1, 3, 32, 48),), world_size=2, token_dims=given)


def test_tokens_of_attention_are_not_given() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(InvalidArgument, match=r"attention was found .*leave token_dims out"):
        ringfx.plan(model, (drawn(1, 12, 8),), world_size=2, token_dims={"src": 1})


class WeightsToo(nn.Module):
    """Decoy: attention that is none to ringfx, as its weights are a result."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.short = nn.Linear(8, 24), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(self.short(x.mT).mT).chunk(3, -1)
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights


def test_attention_that_no_strategy_computes_is_said_to_be_by_rows() -> None:
    found = split_here(WeightsToo(), (drawn(2, 13, 8),), 2)
    assert found.worst < 1e-10
    (entry,) = found.program.plan.by_rows
    assert entry.reason.startswith("its attention weights are also an output")


def test_attention_that_is_missed_is_announced_and_refused_if_strict_unless_it_is_by_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "recover", lambda captured, candidates: Sites(found=()))
    found = split_here(WeightsToo(), (drawn(2, 12, 8),), 2, strict=True)
    assert found.worst < 1e-10
    (entry,) = found.program.plan.by_rows
    assert "was not recognised" in entry.reason
    monkeypatch.setattr(steps, "by_rows", lambda *_: ())
    (entry,) = split_here(WeightsToo(), (drawn(2, 12, 8),), 2).program.plan.missed
    with pytest.raises(AttentionMissed):
        split_here(WeightsToo(), (drawn(2, 12, 8),), 2, strict=True)


def case(name: str, length: int, **options: Any) -> Case:
    return Case(
        model=functools.partial(_model, name, length),
        inputs=functools.partial(_inputs, name, length), loss=weighed, dtype=torch.float64,
        options={"compiler": "aot_eager"} | options, label=name,
    )  # fmt: skip


def _model(name: str, length: int) -> nn.Module:
    return MODELS[name][0](length)


def _inputs(name: str, length: int) -> tuple[torch.Tensor]:
    return (MODELS[name][1](length),)


def images() -> tuple[torch.Tensor]:
    return (drawn(2, 3, 40, 16),)


def weighed(found: torch.Tensor) -> torch.Tensor:
    return (found * torch.arange(found.numel(), dtype=found.dtype).view(found.shape).cos()).sum()


def test_models_without_attention_on_real_ranks(ranks3: RankPool) -> None:
    cases = [
        case("mixed patches", 10), case("long convolution", 13),
        case("state space", 14, strict=True),
        Case(
            model=functools.partial(ResidualImages, 0), inputs=images, loss=weighed,
            dtype=torch.float64, options={"compiler": "aot_eager"}, label="images",
        ),
    ]  # fmt: skip
    for comparison in compare_all(ranks3, cases):
        comparison.check()


class Broken(nn.Module):
    """A graph break between two convolutions; what comes behind it is called x, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.last = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.last(x).sin()


def broken_inputs() -> tuple[torch.Tensor]:
    return (drawn(2, HIDDEN, 29),)


def test_with_token_dims_a_broken_model_is_split_from_the_start(ranks2: RankPool) -> None:
    for given in ({"x": 2}, {}):
        case = Case(
            model=Broken, inputs=broken_inputs, loss=weighed, dtype=torch.float64, label="broken",
            options={"compiler": "eager", "token_dims": given},
        )  # fmt: skip
        (found,) = compare_all(ranks2, [case])
        found.check()
        assert ("all_gather" in found.ranks[0].plan) == (not given), "of the first half"
