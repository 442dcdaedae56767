"""Across a graph break a split value stays split: equal results, and nothing is gathered."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ringfx
from tests.end_to_end.models import tokens
from tests.models.shapes import HEADS, HIDDEN, VOCAB, Base, Block, Causal, FromEmbeddings
from tests.support.harness import (
    Case,
    Comparison,
    RankPool,
    compare_all,
    compare_here,
    gradient_differences,
    raises,
)
from tests.support.recorded import recorded

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor
OPTIONS: dict[str, Any] = {"compiler": "eager", "strategy": "production"}


class Branching(Causal):
    """Goes one way or another by what it sees."""

    causal = True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=self.causal)
        x = x * 2 if float(x.detach().sum()) > 1e9 else x / 2
        x = self.second(x, is_causal=self.causal)
        if float(x.detach().sum()) > 1e9:
            x = -x
        logits: Tensor = self.head(x)
        return logits


class Contiguous(Branching):
    causal = False


class TiedAcross(Branching):
    """One weight in the first program and in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class BrokenBlock(Block):
    """Breaks between its attention and its residual, which therefore crosses too."""

    def forward(self, x: Tensor, memory: Tensor | None = None, **mask: Any) -> Tensor:
        y = self.attention(self.norm(x), memory, **mask)
        torch._dynamo.graph_break()
        x = x + y
        out: Tensor = x + self.mlp(x)
        return out


class Inside(Causal):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BrokenBlock(), BrokenBlock()


class Shapely(Causal):
    """Python between the programs reads what every rank knows."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        scale = describe(x)
        x = self.second(x * scale, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def describe(x: Tensor) -> float:
    assert x.is_floating_point()
    assert x.dim() == 3
    return len(x) / (x.shape[1] + x.size(-1) + x.numel())


class Writing(Causal):
    """Python between the programs, and the next program, write in place."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True) + 0
        y = x.detach()
        write(x)
        x.mul_(0.5)
        torch._dynamo.graph_break()
        y = y + x
        x = self.second(x, is_causal=True) + y
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def write(x: Tensor) -> None:
    x.mul_(2).add_(x)
    x += 1


class WindowWritten(Causal):
    """A program writes a window of what came split, and gives it back whole."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True).clone()
        torch._dynamo.graph_break()
        x[:, 2:].mul_(2)
        torch._dynamo.graph_break()
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class ReadThenWritten(Causal):
    """Rows that a mask selects are read, which gathers; the next program writes, a third reads."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True).clone()
        chosen = ids > VOCAB // 2
        rows = x[chosen] + 3
        x[chosen] = rows
        torch._dynamo.graph_break()
        x.mul_(2)
        torch._dynamo.graph_break()
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class InnerGradient(Causal):
    """Asks for a gradient between its programs: Dynamo is awake while their backward runs."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        energy = x.square().mean()
        torch._dynamo.graph_break()
        (step,) = torch.autograd.grad(energy, self.embed.weight, retain_graph=True)
        torch._dynamo.graph_break()
        x = x - nn.functional.embedding(ids, step.detach())
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class Viewed(Causal):
    """Uncompiled code hands views of a split value on."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        later, last, turned = views(x)
        torch._dynamo.graph_break()
        x = turned.transpose(0, 1) + last[:, None] + nn.functional.pad(later, (0, 0, 1, 0))
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def views(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[:, 1:], x[:, -1], x.transpose(0, 1)


class Turned(Causal):
    """Uncompiled code changes shapes in place, as torch's own quantile does."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        x = turn(x * 2).transpose(0, 1) + middle(x)
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def middle(x: Tensor) -> Tensor:
    return x.quantile(0.5, dim=-1, keepdim=True)


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def turn(x: Tensor) -> Tensor:
    length = x.shape[1]
    x.transpose_(0, 1).unsqueeze_(0)
    assert x.shape[:2] == (1, length)
    return x.squeeze_(0)


class NoTokens(Base):
    """An empty memory, as a cache is before its first token."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(self.embed(ids), is_causal=True)
        empty = x[:, :0]
        torch._dynamo.graph_break()
        x = torch.cat([empty, x], 1)
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits, empty


class Python(Causal):
    """Uncompiled code computes with the value, token by token."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        y = between(x, self.first.norm.weight)
        x = self.second(x + y, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def between(x: Tensor, weight: Tensor) -> Tensor:
    assert not bool(x.isnan().any())
    y = x.double().tanh().to(x.dtype) * 2 + weight.detach()
    return torch.where(y > 0, y, x) - x.mean(-1, keepdim=True)


class InputsTrain(FromEmbeddings):
    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.first(embeddings, is_causal=True)
        torch._dynamo.graph_break()
        out: Tensor = self.second(x, is_causal=True).tanh()
        return out


class Heads(Causal):
    """What crosses is split in a dimension that holds heads or batch too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        flat, by_head = x.flatten(0, 1), x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        torch._dynamo.graph_break()
        x = flat.unflatten(0, (ids.shape[0], -1)) + by_head.transpose(1, 2).flatten(2)
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class Needy(Causal):
    """Python between the programs looks at tokens in another order."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        y = needs_all(x)
        x = self.second(x + y, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def needs_all(x: Tensor) -> Tensor:
    chosen = x[:, torch.arange(x.shape[1]).flip(0)]
    return chosen + x.flip(1)


class Modules(Causal):
    """Runs as ordinary Python with torch's own modules, which Dynamo does not compile alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in (self.first, self.second):
            x = block(x, is_causal=True)
            if float(x.detach().abs().max()) > 1e9:
                x = x.clamp(-1e9, 1e9)
        logits: Tensor = self.head(nn.functional.gelu(self.norm(x)))
        return logits


class Lost(Causal):
    """A write that the row taken before would have to show."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True) + 0
        row = row_and_write(x)
        logits: Tensor = self.head(self.second(x + row[:, None], is_causal=True))
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def row_and_write(x: Tensor) -> Tensor:
    row = x[:, 3]
    x += 1
    return row


def ids(length: int, batch: int = 2) -> Callable[[], tuple[Tensor]]:
    return functools.partial(_ids, length, batch)


def _ids(length: int, batch: int) -> tuple[Tensor]:
    return (tokens(length, batch, vocab=VOCAB),)


def embeddings() -> tuple[Tensor]:
    return (torch.randn(2, 13, HIDDEN, dtype=torch.float64).requires_grad_(),)


def square(output: Tensor) -> Tensor:
    return output.square().mean()


def case(model: Any, inputs: Any = None, **changes: Any) -> Case:
    return Case(
        model=model, inputs=inputs or ids(13), loss=square, dtype=torch.float64,
        label=model.__name__, options=OPTIONS, **changes,
    )  # fmt: skip


@dataclass(frozen=True)
class Crossed:
    """What one rank saw of a case."""

    comparison: Comparison
    programs: int
    gathers: tuple[str, ...]
    """What the plan says is gathered, in programs and between them."""
    wide: int
    """Messages in which a rank gives all of its hidden states."""


def crossed(cases: Sequence[Case]) -> list[Crossed]:
    return [_crossed(case) for case in cases]


def _crossed(case: Case) -> Crossed:
    made: list[Any] = []

    def keep(model: nn.Module, **options: Any) -> nn.Module:
        optimized = ringfx.optimize(model, **options)
        made.append(optimized)
        return optimized

    with recorded() as messages:
        comparison = compare_here(dataclasses.replace(case, optimize=keep))
    plan = made[0].plan
    moved = [f"{m.kind} {m.name}: {m.reason}" for m in plan.reshardings if m.kind.gathers]
    batch, length = case.inputs()[0].shape[:2]  # type: ignore[index]
    part = batch * (length // dist.get_world_size()) * HIDDEN * 8
    wide = sum(m == "all_gather" and m.num_bytes >= part for m in messages)
    return Crossed(comparison, len(made[0]._ringfx_shared.backend.ran), tuple(moved), wide)


def lengths_in_turn(lengths: Sequence[int]) -> list[dict[str, float]]:
    """Differences of gradients after each of several calls of one model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = Inside().double()
    model = copy.deepcopy(stock)
    optimized = ringfx.optimize(model, **OPTIONS)
    found = []
    for length in lengths:
        for call in (stock, optimized):
            square(call(*_ids(length, 1))).backward()  # type: ignore[no-untyped-call]
        ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, stock))
        found.append(gradient_differences(ours, theirs))
        for owner in (stock, model):
            owner.zero_grad()
    return found


def warned(case: Case) -> list[str]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep = Keep()
    logging.getLogger("ringfx").addHandler(keep)
    try:
        compare_here(case).check()
    finally:
        logging.getLogger("ringfx").removeHandler(keep)
    return lines


CASES = (
    case(Branching),
    case(Contiguous),
    case(Contiguous, ids(3)),
    case(TiedAcross),
    case(Shapely),
    case(Writing),
    case(Python),
    case(Heads),
    case(Branching, ids(14), backward=False, steps=2),
)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_crosses_a_break_stays_split(ranks: int, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
    cases = CASES if ranks == 2 else CASES[2:8:2]
    for found in pool.run(crossed, cases):
        for case, one in zip(cases, found, strict=True):
            one.comparison.check()
            assert one.programs > 1, case.label
            assert not one.gathers, (case.label, one.gathers)
            assert one.wide == 1, case.label  # the test reads the output


def logits_squared(output: tuple[Tensor, Tensor]) -> Tensor:
    return square(output[0])


AT_THE_EDGE = (
    case(WindowWritten, ids(16)),
    case(InnerGradient),
    case(Viewed),
    case(Turned),
    dataclasses.replace(case(NoTokens), loss=logits_squared),
)


def test_what_leaves_a_program_whole_or_empty_has_its_gradient(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, AT_THE_EDGE):
        found.check()


TRAINED_BEFORE = (case(InputsTrain, embeddings), case(Inside, ids(17)), case(Modules))
"""What is split was whole before: its gradient must be."""


def test_only_gradients_of_what_came_whole_are_gathered(ranks3: RankPool) -> None:
    for found in ranks3.run(crossed, TRAINED_BEFORE):
        for case, one in zip(TRAINED_BEFORE, found, strict=True):
            one.comparison.check()
            (gradient,) = {g.split(":")[0] for g in one.gathers}
            assert gradient.startswith("all_gather_gradient"), case.label
            assert one.wide == 1 + len(one.gathers), case.label


def test_what_python_needs_whole_is_gathered_once_and_announced(ranks2: RankPool) -> None:
    for lines in ranks2.run(warned, case(Needy)):
        gathers = [x for x in lines if "gathers" in x and "test_split_across_breaks" in x]
        assert len(gathers) == 1, lines
        assert "output 0 (first" in gathers[0]
        assert "in needs_all, which runs outside the compiled programs" in gathers[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_write_after_a_read_that_gathered_is_seen(
    ranks: int, request: pytest.FixtureRequest
) -> None:
    pool = request.getfixturevalue(f"ranks{ranks}")
    for comparison in compare_all(pool, (case(ReadThenWritten),)):
        comparison.check()


def test_other_lengths_are_planned_anew(ranks3: RankPool) -> None:
    for found in ranks3.run(lengths_in_turn, (13, 16, 13, 4)):
        for differences in found:
            assert max(differences.values()) < 1e-10, differences


class TurnedOutside(Causal):
    """Its caller changes the shape of its result in place."""


def with_one_more_dimension(output: Tensor) -> Tensor:
    return output.unsqueeze_(0).square().mean()


def test_a_shape_changed_in_place_where_all_tokens_would_be_needed_is_refused(
    ranks2: RankPool,
) -> None:
    outside = dataclasses.replace(case(TurnedOutside), loss=with_one_more_dimension)
    for text in raises(ranks2, compare_here, outside):
        assert "SplitWrite" in text
        assert "changes its shape in place" in text
        assert "Do: make a new tensor" in text


def test_a_write_that_a_row_taken_before_would_not_show_is_refused(ranks2: RankPool) -> None:
    for text in raises(ranks2, crossed, (case(Lost),)):
        assert "SplitWrite" in text
        assert "output 0 (first" in text
        assert "the other would not see the write" in text
