"""One model, unsplit and split, in float64 where it knows that: how far apart, what is whole.

Ranks are processes that compile with Dynamo (``compared``), or threads of one process on what
``make_fx`` traces (``measure``): quicker, and without lines of source in what the plan says.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import nn

import ringfx
from ringfx.comparison.agreement import Exact
from ringfx.compile import computed_whole
from ringfx.errors import AttentionNotFound, VerificationError
from ringfx.ir.note import NoteKind, texts_of
from ringfx.ir.plan import Plan
from ringfx.ir.values import CommKind
from ringfx.passes.tensor_parallel import capture_parts
from tests.corpus.build import draw, total
from tests.corpus.third_party.row import Row
from tests.support.harness import Case, Comparison, compare_here
from tests.support.split_here import split_here

__all__ = ["Outcome", "compared", "is_double", "measure"]

PIPELINE = "ringfx.compile.pipeline"
OPTIONS = {"compiler": "eager", "on_unsupported": "gather"}
MOST = {torch.float64: 1e-8, torch.float32: 2e-4}
"""Relative difference up to which results are equal."""
WIDE = 0.25
"""What is at least so much of an ordinary split value is no count or mask."""
EVERY = "ringfx.every_token: every row of scores"
LITTLE = 0.05
"""Of all bytes that the forward computes so many may be on every rank without a word."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was seen of one model."""

    verdict: str
    """``split``, ``rows``, ``gathers``, ``whole``, ``refused``, ``error``, ``SILENT`` or ``WRONG``;
    see ``page.py``."""
    by: str = "threads"
    """``threads`` of one process, or ``ranks``, processes that compile."""
    dtype: str = "float64"
    worst: float = 0.0
    """Relative difference of an output or a gradient."""
    share: float = 0.0
    """Of the bytes that the forward computes those that every rank has whole."""
    why: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    """By strategy."""
    trace: str = ""
    seconds: float = 0.0

    def dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(eq=False)
class Seen:
    """Of all programs of a model."""

    split: list[int] = field(default_factory=list)
    whole: list[tuple[int, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        alone = sum(size for size, _ in self.whole)
        return alone / max(alone + sum(self.split), 1)

    @property
    def ordinary(self) -> int:
        return computed_whole._ordinary(self.split)

    @property
    def largest(self) -> list[str]:
        return [text for _, text in sorted(self.whole, key=lambda x: -x[0])[:4]]


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts what programs compute, whatever the plan says of it."""
    seen, original = Seen(), computed_whole.notes_of_whole

    def spy(captured: Any, placement: Any, world_size: int) -> Any:
        for x in computed_whole.computed(captured, placement):
            if not x.is_float or computed_whole._is_view(x.node):
                continue
            if x.is_split:
                seen.split.append(x.bytes)
            else:
                where = x.node.meta.get("ringfx_source", "")
                seen.whole.append((x.bytes, f"{x.node.target} ({where})"))
        return original(captured, placement, world_size)

    with mock.patch(f"{PIPELINE}.notes_of_whole", spy):
        yield seen


def model_of(row: Row) -> nn.Module:
    torch.manual_seed(7)
    model = row.build()
    draw(model)
    return model


def inputs_of(row: Row, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [x.to(dtype) if x.is_floating_point() else x for x in row.inputs()]


def is_double(row: Row) -> bool:
    """Whether the unsplit model runs in float64: some ask for float32 halfway."""
    try:
        model_of(row).double()(*inputs_of(row, torch.float64))
    except RuntimeError:
        return False
    return True


def measure(row: Row, ranks: int) -> Outcome | None:
    """On ranks that are threads; None where the program cannot be traced so."""
    dtype = torch.float64 if is_double(row) else torch.float32
    reached: list[bool] = []
    original = capture_parts

    def noted(*args: Any) -> Any:
        reached.append(True)
        return original(*args)

    with watched() as seen, mock.patch(f"{PIPELINE}.capture_parts", noted):
        try:
            found = split_here(model_of(row), inputs_of(row, dtype), ranks, dtype=dtype, **OPTIONS)
        except Exception as error:
            return failed(error, "threads", dtype) if reached else None
    return judged(found.program.plan, seen, found.worst, "threads", dtype)


def compared(row: Row, dtype: torch.dtype) -> Outcome:
    """On this process's rank."""
    optimized: list[Any] = []

    def optimize(model: nn.Module, **options: Any) -> nn.Module:
        optimized.append(ringfx.optimize(model, **options))
        return optimized[0]

    case = Case(
        model=lambda: model_of(row), inputs=lambda: inputs_of(row, dtype), dtype=dtype,
        options=OPTIONS, loss=total, optimize=optimize,
    )  # fmt: skip
    with watched() as seen:
        try:
            found = worst_of(compare_here(case))
        except Exception as error:
            return failed(error, "ranks", dtype)
    allowed = MOST[dtype]
    if found > allowed:  # it may ask for float32 halfway: as far as that takes it from exact
        allowed = max(allowed, 4 * worst_of(compare_here(replace(case, optimize=Exactly))))
    return judged(optimized[0].plan, seen, found, "ranks", dtype, allowed)


class Exactly(nn.Module):
    """The model in float64 wherever it asks for float32."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: torch.Tensor) -> Any:
        with Exact():
            return self.model(*args)


def worst_of(found: Comparison) -> float:
    return max(found.loss, found.output, found.gradient)


def failed(error: Exception, by: str, dtype: torch.dtype) -> Outcome:
    on_purpose = isinstance(error, ringfx.RingfxError) and not isinstance(error, VerificationError)
    return Outcome(
        verdict="refused" if on_purpose else "error", by=by, dtype=name_of(dtype),
        why=(f"{type(error).__name__}: {error}",),
        trace="".join(traceback.format_exception(error))[-6000:],
        share=1.0 if isinstance(error, AttentionNotFound) else 0.0,
    )  # fmt: skip


def judged(
    plan: Plan, seen: Seen, worst: float, by: str, dtype: torch.dtype, allowed: float = 0.0
) -> Outcome:
    announced = gathered(plan, seen)
    if seen.share > LITTLE:
        announced += texts_of(plan.notes, NoteKind.WHOLE)
        announced += [x for x in texts_of(plan.notes, NoteKind.NOTE) if " ranks computes " in x]
    announced += [f"{x.name}: replicated: {x.reason}" for x in plan.replicated_layers]
    announced += [] if plan.is_split else [plan.unsplit_words]
    silent = seen.largest if seen.share > LITTLE else []
    if not worst <= max(MOST[dtype], allowed):
        verdict = "WRONG"
    elif plan.by_rows and announced and all(EVERY in x for x in announced):
        verdict = "rows"
    elif not announced:
        verdict = "SILENT" if silent else "split"
    else:
        verdict = "whole" if seen.share > 0.5 else "gathers"
    why = announced or silent
    return Outcome(
        verdict=verdict, by=by, dtype=name_of(dtype), worst=worst, share=round(seen.share, 3),
        why=tuple(dict.fromkeys(why)), attentions=tuple(x.strategy for x in plan.layers),
    )  # fmt: skip


def gathered(plan: Plan, seen: Seen) -> list[str]:
    """Hidden states that are gathered; the gradient of a whole input is none."""
    wide = [
        m
        for m in plan.collectives
        if m.kind is CommKind.ALL_GATHER
        and m.bytes_moved * plan.world_size / (plan.world_size - 1) >= WIDE * seen.ordinary
    ]
    return [f"{m.name or m.node} ({m.source}): {m.reason}" for m in wide]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The worst rank's."""
    order = ("error", "WRONG", "refused", "SILENT", "whole", "gathers", "rows", "split")
    return min(outcomes, key=lambda x: (order.index(x.verdict), -x.worst))
