"""Counters, timings and profiler ranges of a layer."""

from __future__ import annotations

import torch

from ringfx import ops
from ringfx.comm import stats
from tests.support.ranks import RankPool


def _counted(timed: bool) -> stats.LayerStats:
    torch.set_num_threads(1)
    stats.reset()
    q = torch.randn(1, 2, 64, 16, requires_grad=True)

    def step() -> None:
        out = ops.ring_attention(q, q, q, causal=True, layout="zigzag", name="layers.1")
        out.sum().backward()

    if timed:
        with stats.timed():
            step()
    else:
        step()
    return stats.snapshot()["layers.1"]


def test_messages_and_bytes_are_those_of_a_ring(ranks2: RankPool) -> None:
    block_bytes = 2 * 1 * 2 * 64 * 16 * 4
    for found in ranks2.run(_counted, False):
        assert (found.forwards, found.backwards) == (1, 1)
        assert found.kernel == "cpu_flash"
        assert found.messages == 3  # K/V in forward and backward, dK/dV home
        assert found.bytes_sent == 3 * block_bytes
        assert found.tiles > 0
        assert found.retries == 0
        assert found.compute_s == found.wait_s == 0.0


def test_timings_are_taken_when_asked_for(ranks2: RankPool) -> None:
    for found in ranks2.run(_counted, True):
        assert found.compute_s > 0.0
        assert found.wait_s > 0.0


def test_profiler_ranges_name_the_layer() -> None:
    q = torch.randn(1, 2, 8, 8)
    with torch.profiler.profile() as profile:
        ops.ring_attention(q, q, q, name="layers.5")
    assert "layers.5: tiles" in {event.name for event in profile.events()}
