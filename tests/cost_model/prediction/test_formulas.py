from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from ringfx.cost_model.prediction.predict import Prediction
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.work import _gathered as gathered_counts
from ringfx.cost_model.prediction.work import ring_work, whole_work
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.tiles import Expr
from ringfx.strategies import STRATEGIES as TABLE
from tests.cost_model.sites import causal_site, full_site, predicted, shipped

H100 = shipped("h100-sxm-published")
CPU = shipped("cpu-default")
STRATEGIES = sorted(TABLE)


def _slower_links(profile: Profile, factor: float) -> Profile:
    links = tuple(replace(row, gbytes_per_s=row.gbytes_per_s / factor) for row in profile.links)
    return replace(profile, links=links)


def _times(p: Prediction) -> list[float]:
    phases = (p.forward, p.backward)
    return [t for x in phases for t in (x.compute_s, x.communication_s, x.exposed_s, x.total_s)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 1024])
@pytest.mark.parametrize("tokens", [1, 251, 4096, 2**20, 2**27])
def test_predictions_are_finite_and_not_negative(
    strategy: str, world_size: int, tokens: int
) -> None:
    prediction = predicted(causal_site(tokens=tokens), strategy, world_size, H100)
    assert all(math.isfinite(t) and t >= 0 for t in _times(prediction))
    assert prediction.total_ms > 0
    assert prediction.saved_bytes > 0
    assert prediction.workspace_bytes > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_time_and_memory_grow_with_the_sequence(strategy: str) -> None:
    lengths = [64, 65, 1000, 4096, 4097, 65536, 2**20]
    costs = [predicted(causal_site(tokens=n), strategy, 4, CPU) for n in lengths]
    assert [c.total_ms for c in costs] == sorted(c.total_ms for c in costs)
    assert [c.saved_bytes for c in costs] == sorted(c.saved_bytes for c in costs)
    assert [c.workspace_bytes for c in costs] == sorted(c.workspace_bytes for c in costs)
    assert costs[-1].total_ms > 1e3 * costs[0].total_ms


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("field", ["heads", "kv_heads", "batch", "head_dim", "v_head_dim"])
def test_time_and_memory_grow_with_every_size(strategy: str, field: str) -> None:
    costs = [predicted(causal_site(**{field: n}), strategy, 4, H100) for n in (8, 16, 32)]
    times = [c.total_ms for c in costs]
    assert times == sorted(times)
    # More K/V heads only cost messages, which a ring hides; all other sizes cost compute too.
    assert times[0] < times[-1] or (field == "kv_heads" and strategy == "production")
    assert costs[0].saved_bytes < costs[-1].saved_bytes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_slower_link_never_helps_and_in_the_end_hurts(strategy: str) -> None:
    site = causal_site()
    times = [predicted(site, strategy, 4, _slower_links(H100, f)).total_ms for f in (1, 2, 10, 1e4)]
    assert times == sorted(times)
    assert times[-1] > 2 * times[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_sends_nothing_and_runs_its_kernel_over_the_whole_sequence(strategy: str) -> None:
    alone = predicted(full_site(), strategy, 1, H100)
    assert alone.communication_ms == alone.exposed_ms == 0
    assert alone.kernel == ("math" if strategy == "simple" else "cuda_cudnn")
    if strategy != "simple":
        other = predicted(full_site(), "production", 1, H100)
        named = {x: getattr(alone, x) for x in ("strategy", "gloss", "own_queries")}
        assert alone == replace(other, **named)


def test_a_soft_cap_needs_plain_products() -> None:
    site = full_site()
    capped = replace(site, spec=replace(site.spec, soft_cap=30.0))
    for strategy in STRATEGIES:
        assert predicted(capped, strategy, 4, H100).kernel == "math"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_nothing_hides_is_part_of_what_is_sent(strategy: str) -> None:
    for factor in (0.01, 1, 100):
        p = predicted(causal_site(), strategy, 8, _slower_links(H100, factor))
        assert p.exposed_ms <= p.communication_ms * (1 + 1e-12)
        assert p.total_ms == pytest.approx(p.compute_ms + p.exposed_ms)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inference_has_no_backward_and_saves_nothing(strategy: str) -> None:
    p = predicted(causal_site(trains=False), strategy, 4, H100)
    trained = predicted(causal_site(), strategy, 4, H100)
    assert p.backward_ms == 0
    assert p.saved_bytes == 0
    assert p.forward == trained.forward
    assert p.workspace_bytes <= trained.workspace_bytes


@pytest.mark.parametrize("strategy", ["collective", "production", "ulysses"])
def test_a_causal_mask_halves_the_compute_of_long_sequences(strategy: str) -> None:
    causal = predicted(causal_site(tokens=2**20), strategy, 8, H100)
    full = predicted(full_site(tokens=2**20), strategy, 8, H100)
    assert causal.compute_ms == pytest.approx(full.compute_ms / 2, rel=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_stores_all_scores(strategy: str) -> None:
    """Twice the tokens, at most twice the workspace."""
    short, long = (predicted(causal_site(tokens=n), strategy, 8, H100) for n in (2**16, 2**17))
    assert long.workspace_bytes <= 2 * short.workspace_bytes


def test_a_window_costs_what_it_keeps_and_its_ring_is_short() -> None:
    window = ("and", tiles.CAUSAL, ("gt", tiles.K, ("sub", tiles.Q, ("const", 4096))))
    spec = AttentionSpec(scale=0.1, q_len=2**17, kv_len=2**17, keep=window)
    site = causal_site(tokens=2**17, spec=spec, balanced=True, density=4096 / 2**17)
    causal = predicted(causal_site(tokens=2**17), "production", 8, H100)
    narrow = predicted(site, "production", 8, H100)
    # Of 16 times fewer pairs the masked edges run in a kernel of a third of the rate.
    assert narrow.compute_ms < causal.compute_ms / 7
    assert narrow.communication_ms < causal.communication_ms / 3
    assert predicted(site, "simple", 8, H100).communication_ms > narrow.communication_ms


def test_a_mask_that_depends_on_data_counts_wherever_positions_allow_it() -> None:
    documents = ("eq", ("at", 0, tiles.Q), ("at", 0, tiles.K))
    spec = AttentionSpec(scale=0.1, q_len=8192, kv_len=8192, keep=("and", tiles.CAUSAL, documents))
    profile = replace(H100, mask_ns_per_pair=1e-3)
    packed = predicted(causal_site(spec=spec), "production", 4, profile)
    causal = predicted(causal_site(), "production", 4, profile)
    assert causal.compute_ms < packed.compute_ms < 10 * causal.compute_ms


def test_causal_work_is_balanced_in_zigzag_and_not_in_runs() -> None:
    spec = causal_site(tokens=8192).spec
    zigzag, runs = (ring_work(spec, kind, 4) for kind in ("zigzag", "contiguous"))
    per_rank = [sum(work.pairs for work in row) for row in zigzag.rows]
    assert max(per_rank) == pytest.approx(min(per_rank), rel=1e-3)
    assert sum(per_rank) == pytest.approx(8192 * 8193 / 2)
    per_rank = [sum(work.pairs for work in row) for row in runs.rows]
    assert max(per_rank) > 5 * min(per_rank)
    assert sum(per_rank) == pytest.approx(8192 * 8193 / 2)


def test_few_ranks_stand_for_many() -> None:
    """The total work of 1024 ranks, from the few that are counted."""
    tokens = 2**20
    table = ring_work(causal_site(tokens=tokens).spec, "zigzag", 1024)
    assert len(table.rows) < 10
    assert table.hops == 1024
    per_rank = [
        sum(work.pairs * times for work, times in zip(row, table.times, strict=True))
        for row in table.rows
    ]
    assert per_rank == pytest.approx([tokens * (tokens + 1) / 2 / 1024] * len(per_rank), rel=0.01)


def test_hops_that_are_counted_do_not_grow_with_the_ranks() -> None:
    spec = causal_site(tokens=2**20).spec
    tables = [ring_work(spec, "zigzag", ranks) for ranks in (33, 1000, 10**5, 10**6 + 3)]
    assert [table.hops for table in tables] == [33, 1000, 10**5, 10**6 + 3]
    assert all(len(table.times) <= 32 for table in tables)


@pytest.mark.parametrize(
    "keep",
    [
        ("and", tiles.CAUSAL, ("lt", ("sub", tiles.Q, tiles.K), ("const", 4096))),
        ("le", tiles.K, ("add", tiles.Q, ("const", 1000))),
        ("or", tiles.CAUSAL, ("lt", tiles.K, ("const", 30_000))),
    ],
)
def test_few_bands_of_a_mask_stand_for_all(keep: Expr, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window, a shifted diagonal, a prefix: what is computed over all bands, from a few."""
    spec = AttentionSpec(scale=0.1, q_len=2**17, kv_len=2**17, keep=keep)
    few = whole_work(spec)
    gathered_counts.cache_clear()
    monkeypatch.setattr("ringfx.cost_model.prediction.work.MOST_BANDS", None)
    every = whole_work(spec)
    gathered_counts.cache_clear()
    for field in fields(every):
        assert getattr(few, field.name) == pytest.approx(getattr(every, field.name), rel=0.03)


def test_a_hop_that_stands_for_several_takes_their_time() -> None:
    """A ring of 40 hops counts some twice; without a mask all are alike."""
    p = 40
    site, small = full_site(tokens=p * 4096), full_site(tokens=30 * 4096)
    long, short = (predicted(x, "production", n, H100) for x, n in ((site, p), (small, 30)))
    a_hop = short.forward.compute_s / 30
    assert long.forward.compute_s == pytest.approx(p * a_hop, rel=1e-2)


def test_saved_memory_falls_with_the_ranks() -> None:
    one, eight = (predicted(causal_site(), "production", p, H100) for p in (1, 8))
    assert eight.saved_bytes * 8 == one.saved_bytes


def test_gathering_costs_memory_of_whole_keys_and_values() -> None:
    ring, gather = (predicted(causal_site(), s, 8, H100) for s in ("production", "collective"))
    whole_kv = 8 * 8192 * (128 + 128) * 2
    assert gather.workspace_bytes > ring.workspace_bytes
    assert gather.workspace_bytes > whole_kv


def test_a_ring_hides_messages_behind_long_compute_and_not_behind_short() -> None:
    slow = _slower_links(H100, 20)
    long, short = (predicted(causal_site(tokens=n), "production", 8, slow) for n in (2**20, 4096))
    assert long.forward.exposed_s == 0
    assert short.forward.exposed_s > 0
    busy = replace(slow, contention_ns_per_byte=0.01)
    imperfect = predicted(causal_site(tokens=2**20), "production", 8, busy)
    sent_bytes = 7 * 2**17 * 8 * (128 + 128) * 2
    assert imperfect.forward.exposed_s == pytest.approx(sent_bytes * 0.01e-9)


def test_the_best_strategy_crosses_over_with_the_length() -> None:
    """Between nodes: short sequences exchange heads once, long ones hide a ring's messages."""

    def best(tokens: int) -> str:
        costs = {s: predicted(full_site(tokens=tokens), s, 16, H100).total_ms for s in STRATEGIES}
        return min(costs, key=lambda s: costs[s])

    assert best(2**20) == "production"
    assert best(1024) in ("ulysses", "collective")


def test_crossing_nodes_takes_the_slower_link() -> None:
    inside, across = (predicted(causal_site(), "collective", p, H100) for p in (8, 9))
    assert across.forward.communication_s > 5 * inside.forward.communication_s
