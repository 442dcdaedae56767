"""Random masks: the tile function is the mask, its classification never wrong, no matrix left."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ringfx.ir import tiles
from ringfx.passes.detect.candidate import score
from ringfx.passes.masks.decompose import decompose
from ringfx.passes.masks.score_terms import Unrepresentable
from tests.passes.exprs.lifting import Lifted, lifted
from tests.passes.masks.grammar import Sizes, given, written
from tests.passes.masks.test_masks import settled
from tests.support.sampling import one_in

Tensor = torch.Tensor


def sizes_of(seed: int) -> Sizes:
    rng = random.Random(seed)
    q_len, kv_len = rng.choice(((6, 6), (5, 7), (8, 4)))
    return Sizes(2, 3, q_len, kv_len)


def check_boolean(seed: int, depth: int) -> None:
    sizes = sizes_of(seed)
    mask, inputs = written(seed, sizes, depth, False), given(sizes, seed)
    found = lifted(mask, inputs)
    expected = mask(*inputs)
    assert torch.equal(found.values(inputs, sizes.shape).bool(), expected)
    check_captured(found, sizes)
    read = read_by(found, inputs)
    rng = random.Random(seed)
    for _ in range(4):
        spans = [sorted(rng.sample(range(n + 1), 2)) for n in sizes.shape]
        box = tiles.Box(**{n: (a, b) for n, (a, b) in zip("bhqk", spans, strict=True)})
        part = expected[tuple(slice(a, b) for a, b in spans)]
        kind = tiles.classify(found.expr, box, read)
        assert kind == "mixed" or bool(part.all() if kind == "full" else not part.any())


def check_additive(seed: int, depth: int) -> None:
    sizes = sizes_of(seed)
    function, inputs = written(seed, sizes, depth, True), given(sizes, seed)
    found = lifted(function, inputs)
    check_captured(found, sizes)
    values = tuple(found.lifter.captured)
    try:
        mask = decompose(
            ("add", score(), found.expr), found.lifter, values, q_len=sizes.q, kv_len=sizes.k,
            empty_row="zero",
        )  # fmt: skip
    except Unrepresentable:  # two masks of different strength
        return
    total = torch.zeros(sizes.shape)
    if mask.bias is not None:
        total = total + found.values(inputs, sizes.shape, mask.bias)
    if mask.keep is not None:
        keep = found.values(inputs, sizes.shape, mask.keep).bool()
        total = total.masked_fill(~keep, -math.inf)
    if mask.fully_masked in ("mean", "absorbed"):  # not rows whose only key is low
        total = total.masked_fill((total == -math.inf).all(-1, keepdim=True), 0.0)
    ours = settled(total)
    theirs = settled(function(*inputs))
    torch.testing.assert_close(shifted(ours), shifted(theirs), rtol=0, atol=0)


def shifted(mask: Tensor) -> Tensor:
    """A number added to all keys of a row says nothing, nor how far below the highest others are.

    A row of -1e4 and -3.4e38 alone gives all its weight to the former.
    """
    top = mask.amax(-1, keepdim=True)
    mask = mask - torch.where((top <= -9_900) & (top > -math.inf), top, 0.0)
    return mask.masked_fill(mask <= -9_900, -math.inf)


def check_captured(found: Lifted, sizes: Sizes) -> None:
    """What is captured has no axis of queries and one of keys."""
    for node in found.captured:
        if node.op != "placeholder":
            assert node.meta["val"].numel() < sizes.q * sizes.k, node


def read_by(found: Lifted, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    reader = torch.fx.Interpreter(found.program, garbage_collect_values=False)
    reader.run(*inputs)
    return [reader.env[n] for n in found.captured]


@pytest.mark.parametrize("start", one_in(2, range(0, 75, 25)))
def test_random_masks(start: int) -> None:
    for seed in range(start, start + 25):
        check_boolean(seed, 2 + seed % 3)


@pytest.mark.parametrize("start", range(0, 50, 25))
def test_random_additive_masks(start: int) -> None:
    for seed in range(start, start + 25):
        check_additive(seed, 1 + seed % 2)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 4000, 250))
def test_many_random_masks(start: int) -> None:
    for seed in range(start, start + 250):
        check_boolean(seed, 2 + seed % 3)
        check_additive(seed, 1 + seed % 3)
