"""Dilated attention (LongNet) on every number of ranks, against the dense pattern in float64."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ringfx import ops
from ringfx.comm import stats
from ringfx.errors import InvalidArgument
from ringfx.ir.dilation import Branch, KeptLayout, KeptRows
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.tiles import CAUSAL, K, Q, conjunction
from ringfx.ir.values import AttentionSite
from ringfx.ops import automatic
from tests.ops.cases import spec
from tests.ops.oracle import (
    Example,
    Result,
    assemble,
    data,
    reference,
    run_all,
)  # fmt: skip
from tests.ops.test_values import TOLERANCE, assert_equal_to_unsplit
from tests.support.ranks import RankPool
from tests.support.sampling import one_in

STRATEGIES = ("simple", "collective", "production", "ulysses")
LAYOUTS: tuple[LayoutKind, ...] = ("contiguous", "zigzag")


def dilated(
    length: int, *branches: tuple[int, int], causal: bool = False, **given: object
) -> Example:
    found = replace(
        spec(length, length, keep=CAUSAL if causal else None),
        branches=tuple(Branch(segment=w, rate=r) for w, r in branches),
    )
    return Example(spec=found, **given)  # type: ignore[arg-type]


def grid(world_size: int) -> Iterator[Example]:
    """Lengths that divide and do not, shorter than a segment and longer than many."""
    kinds = [
        ((32, (8, 1), (16, 2), (32, 4)), {}),
        ((37, (8, 1), (16, 2), (32, 4)), {}),
        ((5, (8, 1), (16, 2)), {}),
        ((30, (7, 1), (11, 3)), {"heads": 6, "kv_heads": 6}),
        ((30, (7, 2), (11, 3), (30, 5)), {"heads": 12, "kv_heads": 4}),
        ((41, (6, 4), (40, 3)), {"heads": 12, "kv_heads": 1, "v_head_dim": 6}),
    ]
    for (length, *branches), given in kinds:
        for strategy in STRATEGIES:
            if strategy == "ulysses" and int(given.get("heads", 4)) % world_size:
                continue
            for causal in (False, True):
                layout = LAYOUTS[(length + causal) % 2]
                yield dilated(
                    length, *branches, causal=causal, strategy=strategy, layout=layout,
                    label=f"{length} {branches} {strategy} {layout} causal={causal}", **given,
                )  # fmt: skip


def drawn(seed: int, world_size: int) -> Example:
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 3, 4))
    length = draw.randint(2, 60)
    rates = [draw.randint(1, 6) for _ in range(draw.randint(1, 4))]
    branches = [(draw.randint(2 * rate, 40), rate) for rate in rates]
    strategy = draw.choice(STRATEGIES if heads % world_size == 0 else STRATEGIES[:3])
    layout = draw.choice(LAYOUTS)
    return dilated(
        length, *branches, causal=draw.random() < 0.5, strategy=strategy, layout=layout,
        batch=draw.choice((1, 2)), heads=heads, kv_heads=kv_heads, head_dim=draw.choice((8, 16)),
        v_head_dim=draw.choice((8, 16)), seed=seed,
        label=f"seed {seed}: {length} {branches} {strategy} {layout} {heads}/{kv_heads}",
    )  # fmt: skip


def test_the_dense_pattern_is_what_the_paper_says() -> None:
    """Segment by segment and head by head, with the denominators of the softmaxes as weights."""
    example = dilated(23, (5, 1), (8, 2), (23, 3), heads=4)
    found, s = data(example), example.spec
    outs, lses = [], []
    for branch in s.branches:
        out = torch.zeros_like(found.q)
        lse = torch.full(found.q.shape[:3], -math.inf, dtype=torch.float64)
        for start in range(0, 23, branch.segment):
            for head in range(4):
                rows = range(
                    start + head % branch.rate, min(start + branch.segment, 23), branch.rate
                )
                q, k, v = (x[:, head, list(rows)] for x in (found.q, found.k, found.v))
                scores = s.scale * q @ k.transpose(-1, -2)
                out[:, head, list(rows)] = scores.softmax(-1) @ v
                lse[:, head, list(rows)] = scores.logsumexp(-1)
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0)
    merged = (weights[..., None] * torch.stack(outs)).sum(0)
    assert torch.allclose(merged, reference(example).out, atol=1e-12)


def test_on_one_rank() -> None:
    assert_equal_to_unsplit(list(grid(1)))
    assert_equal_to_unsplit([drawn(seed, 1) for seed in range(100)])


def of_type(dtype: torch.dtype) -> list[Example]:
    """Both kinds of branches, causal and not; a spread of 1 in what softmax sees."""
    branches = ((16, 1), (32, 2), (64, 5))
    return [
        dilated(
            75, *branches, causal=causal, strategy=strategy, dtype=dtype, heads=8, kv_heads=2,
            head_dim=16, v_head_dim=16, layout=LAYOUTS[causal],
            label=f"{dtype} {strategy} {causal}",
        )
        for strategy in STRATEGIES
        for causal in (False, True)
    ]  # fmt: skip


def errors_of(ours: Result, oracle: Result) -> dict[str, float]:
    """Largest |ours - oracle| of the output and of each gradient."""
    pairs = {"out": (ours.out, oracle.out)}
    pairs |= {name: (ours.grads[name], value) for name, value in oracle.grads.items()}
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}


def errors_of_one_kernel(example: Example) -> dict[str, float]:
    """The largest of any branch alone, of which a row is part of one call of the same kernel."""
    found: dict[str, float] = {}
    for branch in example.spec.branches:
        alone = replace(example, spec=replace(example.spec, branches=(branch,)))
        errors = errors_of(assemble(alone, run_all([alone])), reference(alone))
        found = {name: max(error, found.get(name, 0.0)) for name, error in errors.items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.ranks
def test_in_other_types_errors_are_at_most_twice_those_of_one_kernel(
    ranks2: RankPool, dtype: torch.dtype
) -> None:
    cases = of_type(dtype)
    by_rank = ranks2.run(run_all, cases)
    for example, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        ours = errors_of(assemble(example, results), reference(example))
        theirs = errors_of_one_kernel(example)
        least = 8 * torch.finfo(torch.float32).eps  # sums in another order
        assert all(ours[n] <= max(2 * theirs[n], least) for n in ours), (
            example.label,
            ours,
            theirs,
        )


@pytest.mark.slow  # on three ranks below
@pytest.mark.ranks
def test_on_two_ranks(ranks2: RankPool) -> None:
    assert_equal_to_unsplit(
        [*one_in(2, grid(2)), *(drawn(seed, 2) for seed in range(100, 115))], ranks2
    )


@pytest.mark.ranks
def test_on_three_ranks(ranks3: RankPool) -> None:
    assert_equal_to_unsplit(
        [*one_in(2, grid(3)), *(drawn(seed, 3) for seed in range(200, 210))], ranks3
    )


@pytest.mark.ranks
def test_on_four_ranks(ranks4: RankPool) -> None:
    assert_equal_to_unsplit(
        [*one_in(4, grid(4)), *(drawn(seed, 4) for seed in range(300, 303))], ranks4
    )


@pytest.mark.slow
@pytest.mark.ranks
def test_on_eight_ranks() -> None:
    with RankPool(8) as ranks8:
        assert_equal_to_unsplit([*grid(8), *(drawn(seed, 8) for seed in range(400, 420))], ranks8)


@pytest.mark.slow
@pytest.mark.ranks
def test_many_drawn_configurations(ranks2: RankPool, ranks3: RankPool, ranks4: RankPool) -> None:
    for size, pool in ((2, ranks2), (3, ranks3), (4, ranks4)):
        first = 1000 * size
        cases = [drawn(seed, size) for seed in range(first, first + 200)]
        assert_equal_to_unsplit(cases, pool, tolerance=10 * TOLERANCE)  # some gradients cancel


def bytes_sent(segment: int) -> list[int]:
    """Of each strategy, forward and backward, by this rank; 48 tokens."""
    q, k, v = (torch.randn(1, 4, 24, 8, requires_grad=True) for _ in range(3))
    for strategy in STRATEGIES[:3]:
        out = ops.dilated_attention(
            q, k, v, segment_lengths=[segment], dilation_rates=[2], strategy=strategy, name=strategy
        )
        out.sum().backward()
    return [stats.layer(strategy).bytes_sent for strategy in STRATEGIES[:3]]


def test_only_kept_rows_travel_and_only_within_their_segment(ranks2: RankPool) -> None:
    """Of the segment of 32 tokens that lies on both, rank 0 holds 24 and rank 1 holds 8."""
    assert ranks2.run(bytes_sent, 24) == [[0, 0, 0]] * 2
    row = 4 * (8 + 8) * 4  # of 4 heads: a key and a value of 8 float32
    there, back = 24 // 2 * row, 8 // 2 * row  # K/V forward and again in backward, gradients home
    expected = [[2 * there + back] * 3, [2 * back + there] * 3]
    assert ranks2.run(bytes_sent, 32) == expected


def flops(rate: int) -> list[int]:
    """Of each strategy on this rank, forward and backward: 48 tokens in segments of 16, 4 heads."""
    q, k, v = (torch.randn(1, 4, 24, 8, requires_grad=True) for _ in range(3))
    for strategy in STRATEGIES:
        out = ops.dilated_attention(
            q, k, v, segment_lengths=[16], dilation_rates=[rate], strategy=strategy,
            name=f"{strategy} {rate}",
        )  # fmt: skip
        out.sum().backward()
    return [stats.layer(f"{strategy} {rate}").flops for strategy in STRATEGIES]


@pytest.mark.parametrize("rate", [1, 2, 4])
def test_a_branch_computes_its_kept_pairs_and_no_others(ranks2: RankPool, rate: int) -> None:
    """3 segments keep 16 / r rows of each head: in all r^2 times fewer pairs than without rates."""
    pairs = 4 * 3 * (16 // rate) ** 2
    of_both = [sum(ranks) for ranks in zip(*ranks2.run(flops, rate), strict=True)]
    assert of_both == [pairs * (2 + 5) * 2 * 8] * len(STRATEGIES)


def chosen_by_itself() -> tuple[float, list[str]]:
    """How far the default's output is from production's where ranks would choose differently."""
    q, k, v = (torch.randn(1, 4, 24, 8, dtype=torch.float64) for _ in range(3))
    call = partial(ops.dilated_attention, q, k, v, segment_lengths=[8, 32], dilation_rates=[1, 2])
    own = STRATEGIES[dist.get_rank() + 1]
    asked: list[str] = []

    def ask(site: AttentionSite, size: int) -> str:
        asked.append(own)
        return own

    with mock.patch.object(automatic, "_predicted_fastest", ask):
        auto = [call(), call()][1]
    return float((auto - call(strategy="production")).abs().max()), asked


def test_by_default_all_ranks_take_what_the_first_predicts_to_be_fastest(ranks2: RankPool) -> None:
    """They are asked once for each size."""
    found = ranks2.run(chosen_by_itself)
    assert [asked for _, asked in found] == [["collective"], ["production"]]
    assert max(difference for difference, _ in found) < 1e-12


def chunked(strategy: str) -> Example:
    """What other models call chunked attention: blocks of positions without dilation."""
    chunks = ("eq", ("floordiv", Q, ("const", 7)), ("floordiv", K, ("const", 7)))
    found = spec(40, 40, keep=conjunction(chunks, CAUSAL))
    return Example(spec=found, kv_heads=2, strategy=strategy, layout="zigzag", label=strategy)


def test_chunked_attention_is_sent_by_need_as_well(ranks3: RankPool) -> None:
    assert_equal_to_unsplit([chunked(strategy) for strategy in STRATEGIES[:3]], ranks3)


def test_a_mask_or_bias_beside_branches_is_refused() -> None:
    q = torch.ones(1, 4, 16, 8)
    branches = (Branch(segment=8, rate=2),)
    wrong = replace(spec(16, 16, keep=("lt", K, ("const", 3))), branches=branches)
    with pytest.raises(InvalidArgument, match="dilated attention of 16 queries over 16 keys"):
        ops.attention(
            q, q, q, (), spec=wrong.to_json(), strategy="simple", layout="contiguous", group=""
        )


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_kept_row_is_on_one_rank_and_in_one_strided_run(kind: LayoutKind, size: int) -> None:
    for length, segment, rate, offset in (
        (40, 8, 2, 1),
        (41, 7, 3, 2),
        (9, 20, 4, 3),
        (30, 11, 5, 0),
    ):
        rows = KeptRows(length=length, segment=segment, rate=rate, offset=offset)
        layout = KeptLayout(Layout(kind, length, size), rows)
        found: list[int] = []
        for rank in range(size):
            positions = layout.tokens.positions(rank)
            local = [positions[run.local].tolist() for run in layout.strided_runs(rank)]
            numbered = [
                rows.position(n)
                for there, _ in layout.chunks(rank)
                for n in range(there.start, there.stop)
            ]
            assert [*itertools.chain(*local)] == numbered
            assert sum(run.count for run in layout.strided_runs(rank)) == layout.count(rank)
            found += numbered
        assert sorted(found) == rows.positions()
        assert rows.positions() == [i for i in range(length) if i % segment % rate == offset]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"segment_lengths": [8], "dilation_rates": [1, 2]}, "1 segment_lengths [8], 2 dilation"),
        ({"segment_lengths": [], "dilation_rates": []}, "segment_lengths is []"),
        ({"segment_lengths": [8, 0], "dilation_rates": [1, 2]}, "segment_lengths[1] is 0"),
        ({"segment_lengths": [8, 16], "dilation_rates": [1, 0]}, "dilation_rates[1] is 0"),
        ({"segment_lengths": [16, 8], "dilation_rates": [1, 2]}, "rate 2 after 1, but segment 8"),
        ({"segment_lengths": 8, "dilation_rates": [1]}, "segment_lengths is 8"),
        ({"segment_lengths": [8.0], "dilation_rates": [1]}, "segment_lengths[0] is 8.0"),
        ({"causal": 1}, "causal is 1"),
        ({"strategy": "fast"}, "strategy is 'fast'"),
        ({"length": 0}, "length is 0"),
        ({"scale": math.nan}, "scale is nan"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(given: dict[str, object], named: str) -> None:
    q = torch.ones(1, 4, 16, 8)
    fine: dict[str, object] = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
    with pytest.raises(InvalidArgument, match=re.escape(named)):
        ops.dilated_attention(q, q, q, **(fine | given))  # type: ignore[arg-type]


def test_queries_of_another_sequence_and_heads_that_do_not_divide_are_refused() -> None:
    q, k = torch.ones(1, 4, 16, 8), torch.ones(1, 4, 12, 8)
    with pytest.raises(InvalidArgument, match="q has 16 tokens, k 12"):
        ops.dilated_attention(q, k, k, segment_lengths=[8], dilation_rates=[1])
    k = torch.ones(1, 3, 16, 8)
    with pytest.raises(InvalidArgument, match="4 query heads for 3 key/value heads"):
        ops.dilated_attention(q, k, k, segment_lengths=[8], dilation_rates=[1])
