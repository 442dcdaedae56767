"""One rank ends in each phase of a script, or does something else: what the others hear."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.end_to_end import situations
from tests.end_to_end.faults import TIMEOUT_S, VICTIM, Heard, run
from tests.end_to_end.situations import Script

pytestmark = pytest.mark.ranks

SOON_S = TIMEOUT_S / 4
"""Compiling and failing on a busy machine."""

CAUSES: dict[Callable[[], None], str] = {
    situations.raises: "raised KeyError: 'no such batch' at situations.py:",
    situations.runs_out_of_memory: "raised OutOfMemoryError: CUDA out of memory. Tried to allocate",
    situations.looks_beyond_a_table: "raised IndexError: index out of range in self at situations.",
    situations.exits: "has ended without an error",
    situations.exits_with_a_code: "has ended with exit code 3",
    situations.ends_at_once: "has ended without an error message (killed?",
    situations.is_killed: "has ended without an error message (killed?",
    situations.is_terminated: "has ended without an error message (killed?",
    situations.is_interrupted: "raised KeyboardInterrupt at situations.py:",
    situations.leaves_its_group: "or after destroy_process_group",
}

IN_A_WORKER = "raised RuntimeError: DataLoader worker"
"""What torch makes of a worker that was killed."""

ENDS = [
    ("before optimize", situations.raises),
    ("before optimize", situations.exits_with_a_code),
    ("before the first call", situations.exits),
    ("before the first call", situations.is_killed),
    ("compilation", situations.runs_out_of_memory),
    ("compilation", situations.is_killed),
    ("the first block", situations.raises),
    ("the first block", situations.is_interrupted),
    ("the second block", situations.is_terminated),
    ("after forward", situations.exits),
    ("after forward", situations.looks_beyond_a_table),
    ("after forward", situations.ends_at_once),
    ("backward", situations.runs_out_of_memory),
    ("backward", situations.exits_with_a_code),
    ("backward", situations.is_killed),
    ("before the optimizer", situations.is_interrupted),
    ("before the optimizer", situations.ends_at_once),
    ("between calls", situations.leaves_its_group),
    ("between calls", situations.looks_beyond_a_table),
    ("between calls, beside a worker", situations.is_killed),
    ("the loader", situations.exits_with_a_code),
    ("a worker of the loader", situations.raises),
    ("a worker of the loader", situations.is_killed),
    ("before a barrier", situations.raises),
    ("before a barrier", situations.is_killed),
    ("before a barrier", situations.exits_with_a_code),
]

OFTEN = {
    ("before optimize", situations.raises),
    ("before a barrier", situations.is_killed),
}
"""A kind each; the rest is as slow, and run by ``make test-all``."""


def _expected(phase: str, cause: Callable[[], None]) -> str:
    if phase == "a worker of the loader" and cause is situations.raises:
        return "raised KeyError: Caught KeyError in DataLoader worker"
    killed_worker = phase == "a worker of the loader" and cause is situations.is_killed
    return IN_A_WORKER if killed_worker else CAUSES[cause]


def _check(found: list[Heard], expected: str, survivors: list[int], *, by_log: bool) -> None:
    for heard in found:
        assert heard.answered, found
        if heard.rank not in survivors:
            continue
        assert heard.seconds < SOON_S, heard
        assert expected in (heard.log if by_log else heard.text), heard
        assert by_log or heard.text.split(":")[0] in ("CommunicationError", "AgreementError"), heard
        assert by_log or "gloo" not in heard.text, heard


@pytest.mark.parametrize(
    ("phase", "cause"),
    [row if row in OFTEN else pytest.param(*row, marks=pytest.mark.slow) for row in ENDS],
    ids=lambda x: x.replace(" ", "_") if isinstance(x, str) else x.__name__,
)
def test_what_ends_a_rank_is_heard_in_every_phase(phase: str, cause: Callable[[], None]) -> None:
    found = run(Script(phase, cause))
    by_log = phase == "before a barrier"  # the message is the user's own, and so is its error
    _check(found, _expected(phase, cause), [1 - VICTIM], by_log=by_log)


@pytest.mark.slow
@pytest.mark.parametrize("cause", [situations.raises, situations.is_killed])
@pytest.mark.parametrize("phase", ["between calls", "backward", "before a barrier"])
def test_it_is_heard_where_the_rank_that_ends_serves_the_store(
    phase: str, cause: Callable[[], None]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    found = run(Script(phase, cause), size=3, victim=0, store=address)
    _check(found, f"rank 0 {CAUSES[cause]}", [1, 2], by_log=phase == "before a barrier")


WAIT = "the ranks wait for each other: "
AT_A_BARRIER = " waits in torch.distributed.barrier at situations.py:"
OTHER_CALLS = "The ranks are in different calls: rank 0 at situations.py:"

APART: dict[Callable[[str], None], str] = {
    situations.calls_twice: OTHER_CALLS,
    situations.calls_twice_while_others_are_in_backward: WAIT,
    situations.skips_a_backward: WAIT,
    situations.only_does_backward: WAIT,
    situations.catches_in_backward: WAIT,
    situations.catches_in_backward_before_a_barrier: AT_A_BARRIER,
    situations.evaluates_alone: OTHER_CALLS,
    situations.evaluates_alone_before_a_barrier: AT_A_BARRIER,
    situations.makes_the_first_call_alone_before_a_barrier: AT_A_BARRIER,
    situations.generates_alone: AT_A_BARRIER,
    situations.saves_an_output_alone: AT_A_BARRIER,
    situations.logs_an_output_alone: "the 2 ranks do different things at the same time",
    situations.gives_another_length: "were given inputs of different shapes",
    situations.gives_another_batch_at_first: "were given inputs of different shapes",
    situations.has_another_type: "rank 0 (96, 48) float32, rank 1 (96, 48) float64",
    situations.leaves_a_parameter_out: "absent is not used by that rank's program: look for a hook",
    situations.is_in_another_mode: "is in evaluation mode on rank 1 and in training mode on rank 0",
    situations.keeps_no_gradients: "rank 1 runs this call under torch.no_grad()",
    situations.has_frozen_a_parameter: "requires a gradient on rank 0 but not on rank 1",
    situations.calls_two_models_in_another_order: "has the same shape but different values",
    situations.calls_another_model_first: "before the model's first call, from situations.py:",
}

APART_OFTEN = {
    situations.catches_in_backward,
    situations.evaluates_alone_before_a_barrier,
}


@pytest.mark.parametrize(
    "case",
    [c if c in APART_OFTEN else pytest.param(c, marks=pytest.mark.slow) for c in APART],
    ids=lambda case: case.__name__,
)
def test_ranks_that_do_not_do_the_same_are_told_apart(case: Callable[[str], None]) -> None:
    """One that is in a message of its own hears so in its log."""
    for heard in run(case):
        is_users = heard.text.startswith("RuntimeError: ")
        assert not is_users or APART[case] == AT_A_BARRIER
        _check([heard], APART[case], [heard.rank], by_log=is_users)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [situations.catches_in_backward, situations.evaluates_alone_before_a_barrier]
)
def test_three_ranks_that_do_not_do_the_same(case: Callable[[str], None]) -> None:
    for heard in run(case, size=3):
        is_users = heard.text.startswith("RuntimeError: ")
        _check([heard], APART[case], [heard.rank], by_log=is_users)


@pytest.mark.slow
def test_a_call_that_others_have_ended_before() -> None:
    found = run(situations.calls_while_others_have_ended)
    _check(found, "rank 0 has ended without an error", [VICTIM], by_log=False)


@pytest.mark.slow
def test_saving_parameters_on_one_rank_is_no_fault() -> None:
    assert [heard.text for heard in run(situations.saves_alone)] == ["", ""]


@pytest.mark.slow
def test_a_rank_at_its_own_barrier_reads_what_failed_elsewhere() -> None:
    found = run(situations.fails_and_lives_while_others_are_at_a_barrier)
    assert [heard.text for heard in found] == ["", ""]
    assert f"rank 0{AT_A_BARRIER}" in found[0].log
    assert "but rank 1 raised KeyError: 'no such batch'" in found[0].log
