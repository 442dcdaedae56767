"""What tests find otherwise on another release of torch than that of constraints.txt.

The rows are expected failures, and strict: a row whose test passes turns the run red, so the table
says what a release does today.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch

__all__ = ["DIFFERENCES", "TORCH", "Difference", "Release", "mark_differences"]

Release = tuple[int, ...]
TORCH: Release = tuple(int(number) for number in torch.__version__.split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Tests that fail from release ``first`` to release ``last`` of torch, and the reason."""

    tests: str
    """Pattern of pytest's names, as of ``fnmatch``, where ``[`` stands for itself."""
    first: Release = (0, 0)
    last: Release = (99, 0)
    why: str


UNTIL_2_11: Release = (2, 11)
UNTIL_2_12: Release = (2, 12)
SINCE_2_15: Release = (2, 15)
APART = "tests/passes/capture/test_decomposable.py::test_a_decomposition_has_*"

DIFFERENCES = (
    Difference(
        tests=f"{APART}[aten.lstm.input-*", last=UNTIL_2_12,
        why="torch takes an LSTM apart into other shapes than the operator gives",
    ),
    Difference(
        tests=f"{APART}[aten.narrow_copy.default-*", last=UNTIL_2_11,
        why="the operator itself has no derivative",
    ),
    Difference(
        tests="tests/passes/capture/test_decomposable.py::test_nothing_that_torch_*",
        last=UNTIL_2_11, why="torch takes other operators apart",
    ),
    Difference(
        tests="*::test_carried_with_*[an autograd.Function with mark_dirty*", last=UNTIL_2_11,
        why="Dynamo hands it to the backend, which refuses it by name; later it breaks the graph",
    ),
    Difference(
        tests="tests/end_to_end/test_bad_input.py::test_inputs_on_the_meta_device",
        last=UNTIL_2_12, why="Dynamo's error comes before ours",
    ),
    Difference(
        tests="tests/end_to_end/test_uses.py::test_second_derivatives_*[aot_eager]",
        last=UNTIL_2_12, why="torch's error comes before ours: no gradient has a history there",
    ),
    Difference(
        tests="tests/end_to_end/test_token_axes.py::*[experts, order used-*", last=UNTIL_2_11,
        why="the results are equal, but the sort by expert is gathered and announced",
    ),
    Difference(
        tests="tests/passes/split_modes/test_split_modes.py::*[sort]", last=UNTIL_2_11,
        why="a sort by expert is gathered and announced",
    ),
    Difference(
        tests="tests/passes/split_modes/test_split_modes.py::*[inverse order]", last=UNTIL_2_11,
        why="a sort by expert is gathered and announced",
    ),
    Difference(
        tests="tests/passes/split_modes/test_split_modes.py::*[product by expert]", last=UNTIL_2_11,
        why="a sort by expert is gathered and announced",
    ),
    Difference(
        tests="tests/end_to_end/test_own_backward.py::test_it_runs_split_*[a layer on rows]",
        last=UNTIL_2_11, why="the results are equal, with one more all-gather",
    ),
    Difference(
        tests="tests/passes/axes/test_dtensor_oracle.py::test_dtensor_agrees_with_*",
        last=UNTIL_2_12, why="DTensor has another opinion on stack (2.11), none on rrelu (2.12)",
    ),
    Difference(
        tests="tests/end_to_end/test_said_unsplit.py::test_code_that_dynamo_gives_up_*",
        first=SINCE_2_15, why="Dynamo breaks the graph at an LSTM, and what follows is split",
    ),
    Difference(
        tests="tests/compile/test_inductor_no_fusion.py::test_inductor_takes_a_product_*",
        first=SINCE_2_15, why="the defect is mended there",
    ),
    Difference(
        tests="tests/passes/axes/test_dtensor_oracle.py::test_dtensor_agrees_with_*",
        first=SINCE_2_15, why="DTensor has other opinions",
    ),
)  # fmt: skip


def mark_differences(
    items: Iterable[pytest.Item], release: Release, rows: Iterable[Difference] = DIFFERENCES
) -> None:
    """Marks the tests that a row is about as expected to fail."""
    now = [row for row in rows if row.first <= release <= row.last]
    for item in items:
        for row in now:
            if fnmatch.fnmatchcase(item.nodeid, row.tests.replace("[", "[[]")):
                item.add_marker(pytest.mark.xfail(reason=row.why, strict=True))
