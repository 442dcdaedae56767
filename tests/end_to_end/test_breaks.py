"""Code that Dynamo cannot compile between attentions: results and gradients stay, on two ranks."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from ringfx.ir.note import texts_of
from tests.end_to_end.models import tokens
from tests.models.shapes import VOCAB, Causal
from tests.support.harness import Case, RankPool, compare_all


class Reading(Causal):
    """Reads a value in its loop over blocks: Dynamo skips the frame and compiles the callees."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in (self.first, self.second):
            x = block(x, is_causal=True)
            if float(x.detach().abs().max()) > 1e9:
                x = x.clamp(-1e9, 1e9)
        logits: torch.Tensor = self.head(x)
        return logits


class Recurrent(nn.Module):
    """Attention after a callee that has none, in a frame that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Embedding(VOCAB, 24), nn.LayerNorm(24))
        self.body = Causal()
        self.body.embed = nn.Identity()  # type: ignore[assignment]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for _ in range(2):
            if float(x.detach().mean()) > 1e9:
                x = -x
        logits: torch.Tensor = self.body(x)
        return logits


log = logging.getLogger("tests.end_to_end.test_breaks")
another = logging.getLogger("another")


@functools.cache
def say_once(text: str) -> None:
    log.warning(text)


class Talking(Causal):
    """Says something in every way, also inside of its blocks and about split values."""

    def __init__(self) -> None:
        super().__init__()
        for block in (self.first, self.second):
            block.register_forward_pre_hook(self.say)

    @staticmethod
    def say(block: Any, given: Any) -> None:
        (x,) = given
        log.warning("in a block, %s %s", tuple(x.shape), x.dtype)
        log.warning(f"its first token {x[0, 0, 0]:.6f}")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for number, block in enumerate((self.first, self.second)):
            print("block", number, "of", [1, 2], end=";\n")
            x = block(x, is_causal=True)
            y = x * 2
            log.error("before the write: %s", y[-1, :, 3])
            y += 1
            log.log(logging.WARNING, "after it: %s", y[-1, :, 3])
            x = x + y
            if log.isEnabledFor(logging.DEBUG):
                log.debug("not said %s", x)
        warnings.warn("a warning", RuntimeWarning, stacklevel=2)
        say_once("once")
        logits: torch.Tensor = self.head(x)
        another.warning(f"the mean is {logits.mean():.6f}")
        return logits


def said(model: Any) -> list[str]:
    """All lines of a call, in order, first those of the log."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name != "ringfx":
                lines.append(f"{record.levelname} {record.getMessage()}")

    keep, root = Keep(), logging.getLogger()
    root.addHandler(keep)
    torch.set_printoptions(precision=4)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", RuntimeWarning)
            say_once.cache_clear()
            model(*inputs())
    finally:
        root.removeHandler(keep)
    own = [str(w.message) for w in warned if w.category is RuntimeWarning]
    return [*lines, printed.getvalue(), *own]


def said_by_both() -> tuple[list[str], list[str], int]:
    stock = Talking()
    model: Any = ringfx.optimize(copy.deepcopy(stock), compiler="eager")
    with torch.no_grad():
        ours = said(model)
        return ours, said(stock), len(model._ringfx_shared.backend.ran)


def inputs() -> tuple[torch.Tensor, ...]:
    return (tokens(11, 2, vocab=VOCAB),)


def square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def case(model: Any) -> Case:
    return Case(
        model=model, inputs=inputs, loss=square, dtype=torch.float64, label=model.__name__,
        options={"compiler": "eager"},
    )  # fmt: skip


def test_gradients_cross_programs_that_uncompiled_code_joins(ranks2: RankPool) -> None:
    for comparison in compare_all(ranks2, [case(Reading), case(Recurrent)]):
        comparison.check()
        assert len(comparison.strategies) == 2


def test_log_lines_are_said_as_the_unsplit_model_says_them(ranks2: RankPool) -> None:
    for ours, expected, programs in ranks2.run(said_by_both):
        assert ours == expected
        assert len(ours) == 4 + 4 + 2 + 2
        assert programs == 1


def test_log_lines_do_not_end_a_program(ranks3: RankPool) -> None:
    (comparison,) = compare_all(ranks3, [case(Talking)])
    comparison.check()
    assert "graph break" not in comparison.ranks[0].plan


def test_other_compilers_still_break_at_log_lines() -> None:
    said_by_both()  # ringfx has traced in this process
    with pytest.raises(torch._dynamo.exc.Unsupported, match="print"):
        torch.compile(Talking(), backend="eager", fullgraph=True)(*inputs())


def test_a_plan_goes_on_with_an_assumed_value_and_says_where() -> None:
    plan = ringfx.plan(Reading(), inputs(), world_size=2)
    assert len(plan.layers) == 2
    notes = texts_of(plan.notes)
    assert any("in forward, which runs uncompiled" in note for note in notes), plan.notes
    assumed = [note for note in notes if note.startswith("planning assumed a number")]
    assert len(assumed) == 1, plan.notes
    assert "to be 0.0: " in assumed[0]
    assert "test_breaks.py:" in assumed[0]
