"""What ends one rank ends the others soon and with its cause, far within the group's timeout."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import ringfx
from tests.end_to_end import faults
from tests.end_to_end.faults import TIMEOUT_S, VICTIM, Heard
from tests.end_to_end.models import plain, tokens
from tests.support.harness import RankPool, error_text, raises
from tests.support.sampling import one_in

pytestmark = pytest.mark.ranks

SOON_S = TIMEOUT_S / 2
"""Starting, compiling and failing on a busy machine; the group's timeout takes longer."""


def _check(found: list[Heard], cause: str, survivors: list[int]) -> None:
    for heard in found:
        assert heard.answered, heard
        if heard.rank in survivors:
            assert cause in heard.text, heard
            assert heard.seconds < SOON_S, heard
            assert "gloo" not in heard.text, heard


CAUSES: dict[Callable[[str], None], str] = {
    faults.raises_between_calls: "rank 1 raised KeyError: 'no such batch' at faults.py:",
    faults.raises_before_the_first_call: "rank 1 raised KeyError: 'no such batch' at faults.py:",
    faults.hook_raises: "rank 1 raised ValueError: the hook fails at faults.py:",
    faults.interrupted: "rank 1 raised KeyboardInterrupt at faults.py:",
    faults.fails_to_compile: "rank 1 raised MemoryError: no room to compile at faults.py:",
    faults.backward_raises: "rank 1 raised ArithmeticError: a gradient of the victim's at",
    faults.ends_early: "rank 1 has ended without an error",
    faults.ends_before_the_first_call: "rank 1 has ended without an error",
    faults.killed: "the process of rank 1 has ended without an error message (killed?",
    faults.backward_raises_and_goes_on: "rank 1 waits in a call of the model",
}


OFTEN = frozenset({faults.backward_raises, faults.ends_early, faults.killed})
"""A kind each; the rest is as slow, and run by ``make test-all``."""


@pytest.mark.parametrize(
    "case",
    [c if c in OFTEN else pytest.param(c, marks=pytest.mark.slow) for c in CAUSES],
    ids=lambda case: case.__name__,
)
def test_what_ends_one_rank_is_heard_by_the_other(case: Callable[[str], None]) -> None:
    _check(faults.run(case), CAUSES[case], survivors=[1 - VICTIM])


@pytest.mark.slow
@pytest.mark.parametrize("case", [faults.hook_raises, faults.killed], ids=lambda c: c.__name__)
def test_what_ends_one_rank_is_heard_by_both_others(case: Callable[[str], None]) -> None:
    _check(faults.run(case, size=3), CAUSES[case], survivors=[0, 2])


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_index_beyond_a_table_is_heard_by_all(size: int) -> None:
    """The rank of the last token meets it: others are told."""
    found = faults.run(faults.beyond, size=size)
    _check(found, "index out of range in self", survivors=list(range(size)))
    others = [heard for heard in found if heard.text.startswith("CommunicationError: ")]
    assert all(" raised IndexError: " in heard.text for heard in others), found


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_it_is_heard_under_every_compiler(compiler: str) -> None:
    found = faults.run(faults.fails_to_compile, compiler=compiler)
    _check(found, CAUSES[faults.fails_to_compile], survivors=[0])


@pytest.mark.parametrize("case", [faults.only_one_calls, faults.touches_alone])
def test_ranks_in_different_places_are_both_named(case: Callable[[str], None]) -> None:
    found = faults.run(case)
    _check(found, "the 2 ranks do different things at the same time", survivors=[0, 1])
    _check(found, "a use of output 0 (head, models.py:", survivors=[0, 1])


@pytest.mark.parametrize(
    "case", one_in(2, [faults.goes_on_after_an_error_of_one, faults.goes_on_after_an_error])
)
def test_after_an_error_that_is_caught_the_ranks_go_on(case: Callable[[str], None]) -> None:
    assert [heard.text for heard in faults.run(case)] == ["", ""]


def keys_after(steps: tuple[int, ...]) -> list[int]:
    model = ringfx.optimize(OnVectors(), compiler="eager")
    store: Any = dist.distributed_c10d._get_default_store()
    found = []
    for step in range(max(steps)):
        model(torch.full((1, 17, 8), float(step))).square().mean().backward()
        dist.barrier()
        if step + 1 in steps:
            found.append(store.num_keys())
            dist.barrier()
    return found


def test_nothing_grows_in_the_store(ranks2: RankPool) -> None:
    for early, late in ranks2.run(keys_after, (2, 200)):
        assert early == late


def touched_late() -> float:
    group = dist.new_group(timeout=datetime.timedelta(seconds=120))
    logits = ringfx.optimize(plain()(), compiler="eager", mesh=group)(tokens(16))
    time.sleep(11.0 if dist.get_rank() == 0 else 0.0)
    return float(logits.sum())


def test_an_output_may_be_touched_as_late_as_the_group_allows(ranks2: RankPool) -> None:
    first, second = ranks2.run(touched_late)
    assert first == second


# --- ranks that come apart later


def trained(steps: int, every: int, apart: str, sharded: bool = False) -> int:
    """Steps until the check finds out."""
    made = plain()()
    model = ringfx.optimize(made, compiler="eager", check_inputs=every, shard_states=sharded)
    is_other = dist.get_rank() == 1
    rate = 0.02 if apart == "rate" and is_other else 0.01
    optimizer = torch.optim.SGD(made.parameters(), lr=rate)
    for step in range(steps):
        model(tokens(16, seed=step)).square().mean().backward()
        if apart == "no gradient" and step == 1 and is_other:
            next(made.parameters()).grad = None
        if not (apart == "skipped" and step == 1 and is_other):
            optimizer.step()
        optimizer.zero_grad()
    return steps


@pytest.mark.parametrize("apart", ["rate", "skipped"])
def test_weights_that_come_apart_are_found_and_named(ranks2: RankPool, apart: str) -> None:
    for text in raises(ranks2, trained, 12, 5, apart):
        assert text.startswith("AgreementError: ")
        assert "has diverged" in text
        assert "between rank 0 (checksum " in text
        assert text.split(": ")[1].split(" ")[0].rpartition(".")[2] in ("weight", "bias")


@pytest.mark.parametrize(
    ("apart", "how"),
    [
        ("rate", "with other settings, the last time lr=0.01 on rank 0 and lr=0.02 on rank 1"),
        ("skipped", "has had 2 optimizer steps on rank 0 and 1 on rank 1"),
        ("no gradient", "has had 2 optimizer steps on rank 0 and 1 on rank 1"),
    ],
)
def test_rows_of_different_steps_are_found_at_the_next_call(
    ranks2: RankPool, apart: str, how: str
) -> None:
    steps = 2 if apart != "rate" else 1
    for text in raises(ranks2, trained, steps + 1, 5, apart, True):
        assert text.startswith("AgreementError: ")
        assert how in text
        assert "of which each rank holds its rows" in text


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_stay_alike_raise_nothing(ranks2: RankPool, sharded: bool) -> None:
    assert ranks2.run(trained, 12, 5, "", sharded) == [12, 12]


class OnVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def other_vectors_later() -> None:
    model = ringfx.optimize(OnVectors(), compiler="eager")
    for seed in (0, dist.get_rank()):
        model(torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(seed)))


def test_float_inputs_are_compared_in_every_call(ranks2: RankPool) -> None:
    for text in raises(ranks2, other_vectors_later):
        assert text.startswith(
            "AgreementError: x has the same shape but different values on rank 0"
        )


@pytest.mark.parametrize("value", ["no", -1, 0.5, None])
def test_what_check_inputs_may_be(value: Any) -> None:
    text = error_text(ringfx.optimize, OnVectors(), check_inputs=value)
    assert text is not None
    assert text.startswith("InvalidArgument: check_inputs=")
