"""Attention spelled out: found in every spelling with equal gradients; look-alikes left alone."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch

from ringfx.ir.tiles import CAUSAL
from ringfx.passes.axes.arrangement import Arrangement, Steps
from ringfx.passes.detect.count_attention import missed
from tests.passes.detect.spellings_combined import COMBINED, COMBINED_DECOYS
from tests.passes.detect.spellings_eager import DECOYS as PLAIN_DECOYS
from tests.passes.detect.spellings_eager import SPELLINGS as PLAIN_SPELLINGS
from tests.passes.detect.spellings_eager import B, E, S, T, Weights, merge, qkv
from tests.passes.detect.spellings_more import MORE, MORE_DECOYS
from tests.support.direct import canonical, program_of, results, worst

Tensor = torch.Tensor
SPELLINGS = {**PLAIN_SPELLINGS, **MORE, **COMBINED}
DECOYS = {**PLAIN_DECOYS, **MORE_DECOYS, **COMBINED_DECOYS}
recovery = importlib.import_module("ringfx.passes.masks.recover")


def given(names: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :2] = keep[1, -3:] = False
    values = {
        "x": torch.randn(B, S, E, generator=generator, dtype=torch.float64),
        "m": torch.randn(B, T, E, generator=generator, dtype=torch.float64),
        "p": keep,
        "f": keep.double(),
        "a": torch.where(keep, 0.0, -1e9)[:, None, None].double(),
    }
    return [values[n] for n in names]


def weights(body: object) -> Weights:
    torch.manual_seed(0)
    return Weights(body).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_found_and_computes_the_same(name: str) -> None:
    case = SPELLINGS[name]
    program, values = program_of(weights(case.body), given(case.inputs))
    before = results(program, values)
    sites = canonical(program)
    assert [s.found_by for s in sites.found] == ["eager"] * case.sites, sites.declined
    assert missed(program, sites) == ((), case.sites)
    after = results(program, values)
    if name == "padding, rows lost, NaN":  # every gradient is NaN in one form or the other
        before, after = before[:1], after[:1]
    # A softmax in float32 rounds; the canonical form stays in float64.
    assert worst(after, before) < (
        1e-4 if name in ("upcast and dropout", "logits in float") else 1e-6
    )
    assert not any("softmax" in str(n.target) for n in program.graph_module.graph.nodes)


def given_infinities(w: Weights, x: Tensor, a: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    hidden = torch.where(torch.ones(S, S).tril() > 0, 0.0, -math.inf)
    return w.o(merge((q @ k.mT + (hidden + a)).softmax(-1) @ v))


def test_a_row_that_a_given_mask_of_infinities_hides_is_nan() -> None:
    """As a softmax makes it, though a causal mask keeps each query's own key."""
    x, a = given("xa")
    a = torch.zeros_like(a).masked_fill(a < 0, -math.inf)
    program, values = program_of(weights(given_infinities), [x, a])
    before = torch.fx.Interpreter(program.graph_module).run(*values)
    assert len(canonical(program).found) == 1
    after = torch.fx.Interpreter(program.graph_module).run(*values)
    assert bool(before.isnan().any())
    assert worst([after], [before]) < 1e-12


def hidden_by_two(w: Weights, x: Tensor, p: Tensor) -> Tensor:
    q, k, v = qkv(w, x)
    later = torch.zeros(S, S, dtype=x.dtype).masked_fill(torch.ones(S, S).triu(1) > 0, -math.inf)
    hidden = later.expand(B, 1, S, S).masked_fill(~p[:, None, None], torch.finfo(x.dtype).min)
    return w.o(merge((q @ k.mT + hidden).softmax(-1) @ v))


def test_the_lowest_float64_is_not_taken_for_infinity() -> None:
    """A left-padded query attends what its padding fills, not what comes later."""
    program, values = program_of(weights(hidden_by_two), given("xp"))
    before = results(program, values)
    assert len(canonical(program).found) == 1
    after = results(program, values)
    assert worst(after[:1], before[:1]) < 1e-12
    assert worst(after, before) < 1e-5


LIKE_ATTENTION = ("windows", "gated by a sink")
"""Found in parts: attention inside windows, and beside its own logsumexp."""


@pytest.mark.parametrize("name", LIKE_ATTENTION)
def test_what_is_attention_in_part_gives_the_same(name: str) -> None:
    program, values = program_of(weights(DECOYS[name]), given("x"))
    before = results(program, values)
    assert len(canonical(program).found) == 1
    assert worst(results(program, values), before) < 1e-12


@pytest.mark.parametrize("name", [name for name in DECOYS if name not in LIKE_ATTENTION])
def test_a_decoy_is_left_alone(name: str) -> None:
    program, values = program_of(weights(DECOYS[name]), given("x"))
    before = results(program, values)
    sites = canonical(program)
    assert sites.found == ()
    assert missed(program, sites)[0] == ()
    assert worst(results(program, values), before) == 0.0


REASONS = {
    "weights used again": "its attention weights have other users (mean)",
    "weights returned": "its attention weights are also an output",
    "scores used again": "its scores have other users (",
    "heads mixed after": "normalises one axis and its values are summed over another",
    "over queries": "normalises one axis and its values are summed over another",
    "a learned query pools": "not products of queries with keys",
    "symmetric, one product": "an axis that queries and keys share",
    "detached": "no gradient flows",
    "an epsilon beside a maximum": "added to the sum of exponentials that its row has scaled",
    "exponentials weighed": "not known to be 0 or 1",
    "written over": "between its product and its softmax stands slice_scatter",
    "masked_scatter": "between its product and its softmax stands masked_scatter",
    "masked after, not renormalised": "its attention weights pass through mul",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_near_miss_says_why(name: str) -> None:
    program, _ = program_of(weights(DECOYS[name]), given("x"))
    (declined,) = canonical(program).declined
    assert REASONS[name] in declined.reason


def test_there_are_many_spellings_and_decoys() -> None:
    assert len(SPELLINGS) >= 100
    assert len(DECOYS) >= 40


@pytest.mark.parametrize(
    "wrong", [{"products": {0: 1.1}}, {"cap": 3.0}, {"bias": ("k",)}, {"written": CAUSAL}]
)
def test_a_canonical_form_that_differs_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    right = recovery.decompose

    def decompose(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(right(*args, **kwargs), **wrong)

    monkeypatch.setattr(recovery, "decompose", decompose)
    program, _ = program_of(weights(SPELLINGS["plain"].body), given("x"))
    sites = canonical(program)
    assert sites.found == ()
    assert "differs from it by" in sites.declined[0].reason


def test_tokens_that_are_rows_and_columns_of_patches_are_moved_as_one_dimension() -> None:
    """Cut in two they could not be split, and the keys of every image would be gathered."""
    head, rows, columns, dim = range(4)
    moved = Arrangement(given=((head,), (dim,), (rows, columns)),
                        wanted=((head,), (rows, columns), (dim,)))  # fmt: skip
    sizes = (4, 5, 6, 12)
    assert moved.steps(sizes.__getitem__) == Steps(
        split=None, order=(0, 2, 1), spaced=None, expanded=None, merged=None
    )
    apart = Arrangement(given=((rows, columns), (dim,)), wanted=((columns, rows), (dim,)))
    assert apart.steps(sizes.__getitem__).split == (5, 6, 12)
