"""Classification of tiles, and masks in words."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout
from ringfx.ir.tiles import CAUSAL, B, Box, Expr, K, Q, TileIndex
from ringfx.ops.tiling.pieces import Tiling, pieces, runs_of

LENGTH = 24
WINDOW: Expr = ("gt", K, ("sub", Q, ("const", 5)))
IDS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [0] * 12 + [1] * 12])
PADDING = torch.arange(LENGTH)[None] < torch.tensor([[17], [24]])
INPUTS = (IDS, PADDING)
DOCUMENTS: Expr = ("eq", ("at", 0, B, Q), ("at", 0, B, K))


def numbers() -> st.SearchStrategy[Expr]:
    leaves = st.sampled_from([Q, K, ("at", 0, B, Q), ("at", 0, B, K)]) | st.integers(-6, 30).map(
        lambda value: ("const", value)
    )

    def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        two = st.sampled_from(["add", "sub", "mul", "min", "max"])
        divided = st.sampled_from(["floordiv", "mod", "truncdiv"])
        positive = st.integers(1, 7).map(lambda value: ("const", value))
        return (
            st.tuples(two, inner, inner)
            | st.tuples(divided, inner, positive)
            | st.tuples(st.sampled_from(["neg", "abs"]), inner)
        )

    return st.recursive(leaves, grown, max_leaves=4)


def masks() -> st.SearchStrategy[Expr]:
    compared = st.tuples(
        st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]), numbers(), numbers()
    ) | st.sampled_from([CAUSAL, WINDOW, DOCUMENTS, ("at", 1, B, K)])

    def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        two = st.sampled_from(["and", "or", "xor"])
        return st.tuples(two, inner, inner) | st.tuples(st.just("not"), inner)

    return st.recursive(compared, grown, max_leaves=3)


def _values(mask: Expr, q: tuple[int, int], k: tuple[int, int]) -> torch.Tensor:
    index = TileIndex(b=torch.arange(2), h=torch.arange(1), q=torch.arange(*q), k=torch.arange(*k))
    kept = tiles.evaluate(mask, index, INPUTS).bool()
    return kept.expand(2, 1, q[1] - q[0], k[1] - k[0])


def spans() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, LENGTH - 1), st.integers(1, 9)).map(
        lambda pair: (pair[0], min(pair[0] + pair[1], LENGTH))
    )


@given(mask=masks(), q=spans(), k=spans())
@settings(max_examples=400)
def test_a_classification_is_never_wrong(
    mask: Expr, q: tuple[int, int], k: tuple[int, int]
) -> None:
    kept = _values(mask, q, k)
    kind = tiles.classify(mask, Box(b=(0, 2), q=q, k=k), INPUTS)
    assert kind == "mixed" or bool(kept.any()) == (kind == "full")
    assert kind != "full" or bool(kept.all())


@given(mask=masks(), size=st.integers(1, 4), zigzag=st.booleans(), tile=st.integers(2, 9))
@settings(max_examples=150)
def test_pieces_cover_every_kept_pair_once(mask: Expr, size: int, zigzag: bool, tile: int) -> None:
    layout = Layout("zigzag" if zigzag else "contiguous", LENGTH, size)
    spec = AttentionSpec(scale=1.0, q_len=LENGTH, kv_len=LENGTH, keep=mask)
    counted = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.int64)
    for tiling in (Tiling(masked=tile), Tiling(masked=tile, plain=tile)):
        counted.zero_()
        for q_rank in range(size):
            for k_rank in range(size):
                found = pieces(
                    spec,
                    runs_of(layout, q_rank),
                    runs_of(layout, k_rank),
                    tiling,
                    b=(0, 2),
                    h=(0, 1),
                    inputs=INPUTS,
                )
                for piece in itertools.chain.from_iterable(p.parts or (p,) for p in found):
                    assert not piece.causal or piece.q.position == piece.k.position
                    assert not piece.causal or piece.q.length == piece.k.length
                    q, k = (piece.q.position, piece.q.stop), (piece.k.position, piece.k.stop)
                    keep = CAUSAL if piece.causal else piece.keep
                    kept = torch.ones((), dtype=torch.bool) if keep is None else _values(keep, q, k)
                    counted[:, :, q[0] : q[1], k[0] : k[1]] += kept
        expected = _values(mask, (0, LENGTH), (0, LENGTH)).long()
        assert torch.equal(counted, expected)


def test_a_causal_sequence_is_one_causal_piece() -> None:
    spec = AttentionSpec(scale=1.0, q_len=4096, kv_len=4096, keep=CAUSAL)
    runs = runs_of(Layout("contiguous", 4096, 1), 0)
    found = list(pieces(spec, runs, runs, Tiling(masked=512), b=(0, 1), h=(0, 1), inputs=()))
    assert [(piece.causal, piece.q.length) for piece in found] == [(True, 4096)]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("keep", [None, CAUSAL])
@pytest.mark.parametrize("length", [4096, 4001])
def test_in_zigzag_each_block_is_one_call(size: int, keep: Expr | None, length: int) -> None:
    layout = Layout("zigzag", length, size)
    spec = AttentionSpec(scale=1.0, q_len=length, kv_len=length, keep=keep)
    kept = torch.ones(length, length, dtype=torch.int64)
    counted = torch.zeros_like(kept)
    for q_rank, k_rank in itertools.product(range(size), repeat=2):
        runs = runs_of(layout, q_rank), runs_of(layout, k_rank)
        (piece,) = pieces(spec, *runs, Tiling(masked=64), b=(0, 1), h=(0, 1), inputs=())
        q, k = (layout.positions(r)[run.offset : run.offset + run.length]
                for r, run in ((q_rank, piece.q), (k_rank, piece.k)))  # fmt: skip
        block = torch.ones(len(q), len(k), dtype=torch.int64)
        counted[q[:, None], k[None]] += block.tril() if piece.causal else block
    assert torch.equal(counted, kept if keep is None else kept.tril())


@pytest.mark.parametrize(
    ("keep", "bias", "words"),
    [
        (None, None, "full"),
        (CAUSAL, None, "causal"),
        (("and", CAUSAL, ("gt", K, ("sub", Q, ("const", 4096)))), None, "causal, window 4096"),
        (("and", CAUSAL, ("lt", ("sub", Q, K), ("const", 4096))), None, "causal, window 4096"),
        (("and", CAUSAL, DOCUMENTS), None, "causal, packed documents"),
        (("and", CAUSAL, ("at", 1, B, K)), None, "causal, key padding"),
        (("or", CAUSAL, ("lt", K, ("const", 9))), None, "causal or first 9 keys"),
        (
            ("eq", ("floordiv", Q, ("const", 64)), ("floordiv", K, ("const", 64))),
            None,
            "chunks of 64",
        ),
        (("at", 0, B, Q, K), None, "a mask given as input"),
        (CAUSAL, ("mul", ("at", 0, ("h",)), ("sub", K, Q)), "causal, ALiBi bias"),
        (None, ("at", 0, ("h",), ("sub", K, Q)), "full, relative bias"),
        (None, ("at", 0, ("h",), Q, K), "full, bias given as input"),
        (("le", ("abs", ("sub", Q, K)), ("const", 4)), None, "within 4 tokens"),
        (
            ("not", ("or", ("gt", K, Q), ("ge", ("sub", Q, K), ("const", 24)))),
            None,
            "causal, window 24",
        ),
        (("not", ("and", ("gt", K, Q), ("ge", K, ("const", 9)))), None, "causal or first 9 keys"),
        (("and", CAUSAL, ("not", ("at", 1, B, K))), None, "causal, key padding"),
    ],
)
def test_masks_in_words(keep: Expr | None, bias: Expr | None, words: str) -> None:
    assert tiles.describe(keep, bias) == words


@pytest.mark.parametrize(
    ("keep", "density", "balanced"),
    [
        (None, 1.0, True),
        (CAUSAL, 0.5, False),
        (("and", CAUSAL, ("gt", K, ("sub", Q, ("const", 100)))), 0.00995, True),
        (("and", CAUSAL, DOCUMENTS), 0.5, False),
        (("at", 0, B, K), 1.0, True),
    ],
)
def test_density_and_balance(keep: Expr | None, density: float, balanced: bool) -> None:
    assert tiles.density(keep, 10_000, 10_000) == pytest.approx(density, rel=1e-2)
    assert tiles.is_balanced(keep, 10_000, 10_000) is balanced


def test_density_of_a_short_sequence_is_exact() -> None:
    assert tiles.density(CAUSAL, 4, 4) == 10 / 16


def test_a_float64_constant_keeps_its_digits_and_its_range() -> None:
    lowest = torch.finfo(torch.float64).min
    tile = TileIndex(*(torch.arange(1) for _ in range(4)))
    for number in (0.1, lowest):
        found = tiles.evaluate(("double", ("const", number)), tile, [])
        assert found.dtype == torch.float64
        assert found.item() == number
