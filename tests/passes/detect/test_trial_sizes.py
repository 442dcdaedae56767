"""Proofs are small, also of attention whose dimensions are of very many axes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ringfx.passes.detect import prove
from ringfx.passes.detect.trial_sizes import LARGEST
from tests.support.direct import canonical, program_of, results, worst

B, ROWS, COLUMNS, SIDE, HEADS, WIDE = 2, 6, 4, 4, 2, 8
TOKENS = SIDE * SIDE
Tensor = torch.Tensor


class MaskedWindows(nn.Module):
    """Windows of an image with a mask for each, all heads in one product with three results; every
    second pixel is left out three times, so that rows and columns are of four axes each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(HEADS * WIDE, 3 * HEADS * WIDE), nn.Linear(HEADS * WIDE, 4)
        self.near = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.shown = nn.Parameter(torch.randn(ROWS * COLUMNS, TOKENS, TOKENS))

    def forward(self, image: Tensor) -> Tensor:
        cut = image.view(B, ROWS, SIDE, COLUMNS, SIDE, HEADS * WIDE).transpose(2, 3)
        each = self.into(cut.reshape(-1, TOKENS, HEADS * WIDE))
        q, k, v = each.view(-1, TOKENS, 3, HEADS, WIDE).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * WIDE**-0.5) @ k.mT + self.near.unsqueeze(0)
        scores = scores.view(B, ROWS * COLUMNS, HEADS, TOKENS, TOKENS) + self.shown[None, :, None]
        weights = scores.view(-1, HEADS, TOKENS, TOKENS).softmax(-1)
        mixed = self.out((weights @ v).transpose(1, 2).reshape(-1, SIDE, SIDE, HEADS * WIDE))
        back = mixed.view(B, ROWS, COLUMNS, SIDE, SIDE, 4).permute(0, 1, 3, 2, 4, 5)
        image = back.reshape(B, ROWS * SIDE, COLUMNS * SIDE, 4)
        for _ in range(3):
            high, wide = image.shape[1] // 2, image.shape[2] // 2
            image = image.view(B, high, 2, wide, 2, 4)[:, :, 1, :, 1]
        return image


def test_no_value_of_a_proof_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    original = prove._Trial.shape

    def shape(trial: prove._Trial, dims: object) -> tuple[int, ...]:
        made = original(trial, dims)  # type: ignore[arg-type]
        found.append(math.prod(made))
        return made

    monkeypatch.setattr(prove._Trial, "shape", shape)
    image = torch.randn(B, ROWS * SIDE, COLUMNS * SIDE, HEADS * WIDE, dtype=torch.float64)
    program, values = program_of(MaskedWindows().double(), [image])
    before = results(program, values)
    sites = canonical(program)
    assert len(sites.found) == 1, sites.declined
    assert worst(results(program, values), before) < 1e-12
    assert 0 < max(found) <= LARGEST
