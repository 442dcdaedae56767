"""Masks with an entry for each query and key: announced with their bytes, and budgeted."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from ringfx.errors import OutOfMemory
from ringfx.ir.note import NoteKind, texts_of
from ringfx.report.detection_report import report_detection
from tests.support.programs import lowered

Tensor = torch.Tensor
S, HEADS, WIDTH = 512, 2, 16
MIB = 2**20


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return F.scaled_dot_product_attention(q, out, v, mask).transpose(1, 2).flatten(2)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(1, S, WIDTH), torch.zeros(1, HEADS, S, S, dtype=dtype)


def text(renderable: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(renderable)
    return out.getvalue()


def test_the_plan_says_how_many_bytes_each_rank_takes() -> None:
    plan = lowered(Given(), *operands(), ranks=4).plan
    said = texts_of(plan.notes, NoteKind.DENSE_MASK)
    assert said == [
        f"qkv (test_given_masks.py:{line()}) and 1 more: a mask or bias given whole, "
        "2.00 MiB: each rank takes the rows of its own queries, 512 KiB"
    ]
    parts = {p.cause: p.bytes for p in plan.memory.parts} if plan.memory else {}
    assert parts["dense input masks"] == 2 * MIB
    assert parts["rows of dense masks"] == MIB // 2  # once for both attentions


def line() -> int:
    """Of the first attention above."""
    with open(__file__) as source:
        lines = source.read().splitlines()
    return next(i for i, x in enumerate(lines, 1) if "out = F.scaled" in x)


def test_a_function_of_positions_and_padding_are_not_given_whole() -> None:
    x, _ = operands()
    plan = lowered(Given(), x, torch.ones(1, 1, 1, S, dtype=torch.bool), ranks=4).plan
    assert not texts_of(plan.notes, NoteKind.DENSE_MASK)


def test_explain_names_it() -> None:
    found = report_detection(Given(), operands(torch.bool))
    assert [s.matrix_bytes for s in found.sites] == [MIB // 2, MIB // 2]
    said = text(found)
    assert "a mask given as input" in said
    assert (
        "reads a mask or bias given whole, 512 KiB: of several ranks each takes the rows of its "
        "own queries"
    ) in said


def test_one_that_does_not_fit_is_refused_with_its_bytes() -> None:
    roomy = lowered(Given(), *operands(), ranks=4, gpu_memory=8 * MIB).plan
    assert roomy.layers
    with pytest.raises(OutOfMemory) as caught:
        lowered(Given(), *operands(), ranks=4, gpu_memory=int(1.9 * MIB))
    assert re.search(r"dense input masks", str(caught.value)), caught.value
