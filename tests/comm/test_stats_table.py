"""Layers' counters as a table: equal layers in one line, times as a mean of them."""

from __future__ import annotations

from ringfx.comm.stats import LayerStats
from ringfx.comm.stats_table import Stats


def layer(wait_s: float = 0.0, sent: int = 6144) -> LayerStats:
    return LayerStats(
        kernel="cpu_flash", forwards=2, backwards=2, tiles=8, messages=6, bytes_sent=sent,
        compute_s=wait_s, wait_s=wait_s,
    )  # fmt: skip


def test_equal_layers_are_one_line_and_times_are_of_one_call() -> None:
    found = Stats(
        {"layers.0": layer(0.002), "layers.1": layer(0.004), "layers.2": layer(sent=0)},
        outside=LayerStats(messages=2, bytes_sent=2**20, wait_s=0.01),
    )
    rows = [line.split() for line in str(found).splitlines()]
    assert rows[0] == ["attention", "kernel", "calls", "messages", "sent", "compute", "wait"]
    assert rows[1][:5] == ["layers.{0,1}", "2", "x", "cpu_flash", "2"]
    assert rows[1][5:] == ["3", "3.00", "KiB", "1.50", "ms", "1.50", "ms"]
    assert rows[2][:4] == ["layers.2", "cpu_flash", "2", "3"]
    assert " ".join(rows[3]) == "outside attention, in all 2 1.00 MiB - 10.0 ms"
    assert found["layers.1"].wait_s == 0.004


def test_without_timing_it_says_how_to_get_it() -> None:
    text = str(Stats({"layers.0": layer()}, outside=LayerStats()))
    assert "times are taken inside `with ringfx.ops.timed():` only" in text
