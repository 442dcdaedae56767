"""What every rank computes whole is announced; masks, positions and tables are no alarm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

import ringfx
from ringfx.comm.world import World
from ringfx.compile import computed_whole
from ringfx.compile.backend import Backend
from ringfx.compile.settings import Settings
from ringfx.ir.note import NoteKind, texts_of
from tests.models.along_tokens import HIDDEN, Along
from tests.support.programs import lowered

Tensor = torch.Tensor
TOKENS = 24


class Model(nn.Module):
    """Attention over [B, S, HIDDEN], and beside it a body by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.mixed, self.own = Along("running_sum"), nn.Linear(HIDDEN, HIDDEN)
        self.body = SILENT[name] if name in SILENT else WHOLE[name][0]

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(self, x, places), self.mixed.attend(x)


Body = Callable[[Model, Tensor, Tensor], Tensor]


def in_order_of_size(m: Model, x: Tensor, places: Tensor) -> Tensor:
    y = m.own(x)
    order = y.norm(dim=-1).argsort(1)
    return y.gather(1, order[..., None].expand_as(y))


def at_places(m: Model, x: Tensor, places: Tensor) -> Tensor:
    y = m.own(x).sin()
    return m.own(y[torch.arange(2)[:, None], y.sum(-1).argsort(1)])


def of_no_tokens(m: Model, x: Tensor, places: Tensor) -> Tensor:
    y = m.own(x[:, :1]).repeat(1, 1, 40)
    for _ in range(12):
        y = y.sin()
    return y


def rotated(m: Model, x: Tensor, places: Tensor) -> Tensor:
    """Decoy: tables of positions that are given."""
    angles = places[..., None] * torch.arange(1, 5) / 9
    turned = torch.cat([angles.cos(), angles.sin()], -1).repeat(1, 1, 2)
    return m.mixed.attend(x * turned)


def masked(m: Model, x: Tensor, places: Tensor) -> Tensor:
    """Decoy: a mask of padding and a count."""
    keep = (places > 2)[..., None]
    mean = (m.own(x) * keep).sum(1) / keep.sum(1)
    return x.masked_fill(~keep, 0.0) + mean[:, None]


def pooled(m: Model, x: Tensor, places: Tensor) -> Tensor:
    """Decoy: a head on one state of each sequence."""
    return m.own(m.own(m.mixed.attend(x).mean(1)).relu())


WHOLE: Mapping[str, tuple[Body, str]] = {
    "in order of size": (
        in_order_of_size,
        "aten.gather.default: it looks elements up along the axis; so each of the 2 ranks computes",
    ),
    "at places": (at_places, "so each of the 2 ranks computes"),
    "of no tokens": (of_no_tokens, "whole, which have no token axis: aten.sin.default"),
}
SILENT: Mapping[str, Body] = {"rotated": rotated, "masked": masked, "pooled": pooled}


def told(name: str, ranks: int = 2) -> list[str]:
    places = torch.arange(TOKENS).expand(2, -1).contiguous()
    program = lowered(Model(name), torch.randn(2, TOKENS, HIDDEN), places, ranks=ranks)
    return texts_of(program.plan.notes, NoteKind.WHOLE)


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_computed_whole_is_told(name: str) -> None:
    (text,) = told(name)
    assert WHOLE[name][1] in text
    assert "test_computed_whole.py:" in text
    assert told(name, ranks=1) == []


@pytest.mark.parametrize("name", SILENT)
def test_what_is_little_or_split_is_no_alarm(name: str) -> None:
    assert told(name) == []


class Broken(nn.Module):
    """A stem, a graph break, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed = nn.Linear(HIDDEN, HIDDEN), Along("running_sum")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).sin()
        torch._dynamo.graph_break()
        return self.mixed.attend(x)


def test_a_part_that_is_not_split_is_told_if_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for least, count in ((2**20, 0), (2**12, 1)):
        monkeypatch.setattr(computed_whole, "PART", least)
        plan = ringfx.plan(Broken(), (torch.randn(2, TOKENS, HIDDEN),), world_size=2)
        told = texts_of(plan.notes, NoteKind.WHOLE)
        assert len(told) == count, told
        assert all("each of the 2 ranks computes 6.00 KiB whole: aten." in x for x in told)


def test_what_is_said_of_one_length_is_not_said_of_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Backend(Settings(), World(1, 0, ""))
    with caplog.at_level(logging.WARNING, logger="ringfx"):
        for size, length in (("8.00 KiB", "1,024"), ("16.0 MiB", "65,536")):
            backend.announce(f"a: gathers {size} on every rank for b", f"x ({length} long)")
            backend.announce(f"c: gathers {size} on every rank for b")
    assert [r.getMessage() for r in caplog.records] == [
        "a: gathers 8.00 KiB on every rank for b", "x (1,024 long)",
        "c: gathers 8.00 KiB on every rank for b",
    ]  # fmt: skip
