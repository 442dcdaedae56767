"""Masks that a module keeps: recognised if every entry agrees, and never when one does not."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringfx
from ringfx.compile.mask_buffer_guard import BufferSnapshot
from ringfx.compile.rank_agreement import checksum
from ringfx.errors import BufferChanged
from ringfx.ir import tiles
from ringfx.passes.exprs.matrices import Matrix, formula_of
from tests.passes.masks import grammar
from tests.passes.masks.test_masks import Recovered, added, recovered

Tensor = torch.Tensor
N, HEADS, DIM = 24, 3, 8
MIN = torch.finfo(torch.float32).min
ROW, COLUMN = torch.arange(N)[:, None], torch.arange(N)[None, :]
ONES = torch.ones(N, N, dtype=torch.bool)
CAUSAL = ONES.tril()
SLOPES = 2.0 ** -(torch.arange(HEADS)[:, None, None] + 1.0)
DISTANCE = COLUMN - ROW + N - 1


def random_table(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


BUFFERS: Mapping[str, tuple[Tensor, str]] = {
    "tril": (CAUSAL, "causal"),
    "GPT-2's": (CAUSAL.view(1, 1, N, N), "causal"),
    "bytes": (CAUSAL.to(torch.uint8), "causal"),
    "a float triu of -inf": (torch.full((N, N), -math.inf).triu(1), "causal"),
    "a float triu of the lowest": (torch.full((N, N), MIN).triu(1), "causal"),
    "a half triu": (torch.full((N, N), -math.inf, dtype=torch.bfloat16).triu(1), "causal"),
    "a weak triu": (torch.full((N, N), -1e4).triu(1), "causal"),
    "everything": (ONES, "full"),
    "zeros": (torch.zeros(N, N), "full"),
    "GPT-Neo's window": (CAUSAL ^ ONES.tril(-5), "causal, window 5"),
    "a float window": (torch.where(CAUSAL & ~ONES.tril(-4), 0.0, -math.inf), "causal, window 4"),
    "a band": ((ROW - COLUMN).abs() <= 3, "within 3 tokens"),
    "a prefix": (CAUSAL | (COLUMN < 5), "first 5 keys or causal"),
    "chunks": (ROW // 4 == COLUMN // 4, "chunks of 4"),
    "causal chunks": ((ROW // 4 == COLUMN // 4) & CAUSAL, "causal, chunks of 4"),
    "chunks before": (COLUMN // 4 <= ROW // 4, "a function of positions"),
    "first keys and a window": (
        CAUSAL & ((COLUMN < 2) | (ROW - COLUMN < 4)), "causal, first 2 keys or window 4",
    ),
    "outside a band": ((ROW - COLUMN).abs() > 3, "a function of positions"),
    "shifted": (COLUMN <= ROW + 2, "causal shifted by 2"),
    "dilated": (CAUSAL & ((ROW - COLUMN) % 3 == 0), "a table of positions"),
    "a window for each head": (
        (ROW - COLUMN)[None] <= torch.tensor([1, 3, 6])[:, None, None], "a table of positions",
    ),
    "ALiBi": (SLOPES * (COLUMN - ROW), "full, ALiBi bias"),
    "causal ALiBi": ((SLOPES * (COLUMN - ROW)).masked_fill(~CAUSAL, -math.inf),
                     "causal, ALiBi bias"),
    "a bias by distance": (random_table(2 * N)[DISTANCE], "full, relative bias"),
    "a bias by distance and head": (random_table(HEADS, 2 * N)[:, DISTANCE], "full, relative bias"),
}  # fmt: skip
UNNAMED: Mapping[str, Tensor] = {
    "random": torch.rand(N, N, generator=torch.Generator().manual_seed(1)) > 0.4,
    "documents": ((ROW < 7).int() - (ROW > 16).int()) == ((COLUMN < 7).int() - (COLUMN > 16).int()),
    "a random bias": random_table(N, N),
}


class Keeps(nn.Module):
    """SDPA under the top left corner of a mask that it keeps."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.mask: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask[..., : q.shape[-2], : k.shape[-2]]
        if mask.dtype == torch.uint8:
            mask = mask.bool()
        if mask.dtype == torch.bfloat16:
            mask = mask.float()
        return F.scaled_dot_product_attention(q, k, v, mask)


def operands(q_len: int, kv_len: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, n, DIM, generator=generator) for n in (q_len, kv_len, kv_len)]


def of_buffer(mask: Tensor, q_len: int = N, kv_len: int = N) -> Recovered:
    return recovered(Keeps(mask), *operands(q_len, kv_len))


def additive(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool or mask.dtype == torch.uint8:
        mask = torch.zeros(mask.shape).masked_fill(~mask.bool(), -math.inf)
    return mask.float()


def check(mask: Tensor, found: Recovered, q_len: int, kv_len: int) -> None:
    theirs = additive(mask)[..., :q_len, :kv_len].expand(2, HEADS, q_len, kv_len)
    ours = added(found)
    theirs = torch.where(theirs <= -9_900, -math.inf, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("q_len", "kv_len"), [(N, N), (13, 13), (7, 15)])
@pytest.mark.parametrize("name", BUFFERS)
def test_a_kept_mask_is_read_once_and_named(name: str, q_len: int, kv_len: int) -> None:
    mask, words = BUFFERS[name]
    found = of_buffer(mask, q_len, kv_len)
    check(mask, found, q_len, kv_len)
    if q_len == N:
        assert found.site.mask_words == words
    assert not [x for x in found.inputs if x.shape[-2:] == (N, N)]


@pytest.mark.parametrize("name", UNNAMED)
def test_what_has_no_name_is_read_as_it_stands(name: str) -> None:
    found = of_buffer(UNNAMED[name])
    check(UNNAMED[name], found, N, N)
    assert "given as input" in found.site.mask_words


@pytest.mark.parametrize("name", [n for n in BUFFERS if n != "a half triu"])
def test_one_other_entry_is_another_mask(name: str) -> None:
    mask = BUFFERS[name][0]
    draw = random.Random(name)
    for _ in range(6):
        changed = mask.clone()
        at = (*(0,) * (mask.dim() - 2), draw.randrange(N), draw.randrange(N))
        changed[at] = ~changed[at] if mask.dtype == torch.bool else 1 - changed[at].clamp(min=-9.0)
        formula = formula_of(Matrix(changed.reshape(-1, N, N)))
        if formula is not None:  # a corner of a table by distance is a value of its own
            found = of_buffer(changed)
            check(changed, found, N, N)


def test_random_masks_in_buffers_are_exact() -> None:
    named = 0
    sizes = grammar.Sizes(batch=1, heads=1, q=N, k=N)
    for seed in range(60):
        writer = grammar.Writer(random.Random(seed), sizes, None)
        mask = writer.truth(2).expand(sizes.shape)[0, 0].contiguous()
        formula = formula_of(Matrix(mask[None]))
        if formula is None or formula.inside is None:
            continue
        named += 1
        index = tiles.TileIndex(*(torch.arange(n) for n in (1, 1, N, N)))
        kept = torch.ones(()) if formula.keep is None else tiles.evaluate(formula.keep, index, ())
        said = torch.where(kept.bool(), bool(formula.inside), bool(formula.outside))
        assert torch.equal(said.expand(1, 1, N, N)[0, 0], mask), f"seed {seed}: {formula}"
    assert named >= 25


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {
        name: formula_of(Matrix(mask.reshape(-1, N, N))) for name, (mask, _) in BUFFERS.items()
    }
    monkeypatch.setattr("ringfx.passes.exprs.matrices.BLOCK", 5 * N)
    for name, (mask, _) in BUFFERS.items():
        assert formula_of(Matrix(mask.reshape(-1, N, N))) == whole[name], name


def test_equal_buffers_of_many_layers_share_one_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Keeps(CAUSAL.clone()), Keeps(CAUSAL.clone())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.second(q, k, self.first(q, k, v))

    looked: list[Any] = []
    module = __import__("ringfx.passes.exprs.buffers", fromlist=["formula_of"])
    right = module.formula_of
    monkeypatch.setattr(module, "formula_of", lambda m: looked.append(m) or right(m))
    recovered(Two(), *operands(N, N))
    assert len(looked) == 1


class Model(nn.Module):
    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.writes = writes
        self.attend = Keeps(CAUSAL.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.attend.mask[:, 0] = True
        return self.attend(x, x, x)


def test_a_buffer_that_changes_is_noticed_however_it_is_written() -> None:
    x = operands(N, N)[0]
    for write in (
        lambda m: m.logical_not_(),
        lambda m: m.data.fill_(True),
        lambda m: m.numpy().fill(True),
    ):
        plain = Model()
        model = ringfx.optimize(plain, compiler="eager")
        torch.testing.assert_close(model(x), Model()(x))
        write(plain.attend.mask)
        with pytest.raises(BufferChanged, match=r"attend\.mask has other values .*_dynamo.reset"):
            model(x)
        torch._dynamo.reset()


def test_a_buffer_put_in_its_place_is_compared_too() -> None:
    x = operands(N, N)[0]
    plain = Model()
    model = ringfx.optimize(plain, compiler="eager")
    model(x)
    plain.attend.mask = CAUSAL.clone()
    torch.testing.assert_close(model(x), Model()(x))
    plain.attend.mask = ONES.triu()
    with pytest.raises(BufferChanged, match="has other values"):
        model(x)


def test_a_buffer_that_the_model_writes_is_read_as_it_stands() -> None:
    x = operands(N, N)[0]
    plain, oracle = Model(writes=True), Model(writes=True)
    model = ringfx.optimize(plain, compiler="eager")
    for _ in range(2):
        torch.testing.assert_close(model(x), oracle(x))
    plain.attend.mask[:, 1] = True
    oracle.attend.mask[:, 1] = True
    torch.testing.assert_close(model(x), oracle(x))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_every_byte_of_a_kept_buffer_is_compared(dtype: torch.dtype) -> None:
    value = torch.zeros(1001, dtype=dtype)
    value[-2] = math.nan if dtype == torch.float32 else 1
    kept = BufferSnapshot({3: value})
    inputs: list[Any] = [None, None, None, value]
    assert kept.unchanged(inputs) == {3}
    for i in (0, 1, 7, 8, 500, 999, 1000):
        inputs[3] = value.clone()
        inputs[3][i] = 1 if inputs[3][i] == 0 else 0
        assert kept.unchanged(inputs) == frozenset()
    longer = torch.cat([value[:3], value, value[:5]])
    inputs[3] = longer[3:1004]
    assert kept.unchanged(inputs) == {3}


def test_equal_buffers_are_kept_once_and_looked_at_once() -> None:
    mask = ONES.tril()
    kept = BufferSnapshot({0: mask, 1: mask.clone(), 2: ONES})
    assert len({id(copy) for copy in kept._copies.values()}) == 2
    assert kept.unchanged([mask, mask, ONES]) == {0, 1, 2}
    assert kept.unchanged([mask, ONES, ONES]) == {0, 2}


def test_a_checksum_sees_every_byte_and_place() -> None:
    value = torch.zeros(1001, dtype=torch.bool)
    sums = {checksum(value)}
    for i in (0, 1, 7, 8, 500, 999, 1000):
        changed = value.clone()
        changed[i] = True
        sums.add(checksum(changed))
    assert len(sums) == 8
    shifted = torch.zeros(1009, dtype=torch.bool)[3:1004]
    assert checksum(shifted) == checksum(value)
