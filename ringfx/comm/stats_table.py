"""What attentions did, as a mapping that prints as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ringfx.comm.collective_ops import WHERE
from ringfx.comm.stats import LayerStats, snapshot
from ringfx.ir.folding import fold_names
from ringfx.units.columns import table_lines
from ringfx.units.format import format_bytes, format_ms

__all__ = ["Stats"]


class Stats(dict[str, LayerStats]):
    """Layers' sums by module path; its text is a table, of one call of each layer."""

    def __init__(self, layers: Mapping[str, LayerStats], outside: LayerStats) -> None:
        super().__init__(layers)
        self.outside = outside
        """Messages outside attention, of all models of this process."""

    @staticmethod
    def of(names: Collection[str]) -> Stats:
        """As they are now."""
        found = snapshot()
        layers = {name: x for name, x in found.items() if name in names}
        return Stats(layers, found.get(WHERE, LayerStats()))

    def __str__(self) -> str:
        titles = ("attention", "", "kernel", "calls", "messages", "sent", "compute", "wait")
        rows = [_row(name, found) for name, found in _alike(self)]
        outside = ("outside attention, in all", "", *_cells(self.outside, 1)[1:])
        lines = table_lines([titles, *rows, (outside[0], "", "", "", *outside[3:])], left=(0, 2))
        timed = any(x.wait_s or x.compute_s for x in (*self.values(), self.outside))
        told = "a call is a forward with its backward; sent and times are of one call, on this rank"
        return "\n".join((*lines, told, *(() if timed else (UNTIMED,))))


UNTIMED = "times are taken inside `with ringfx.ops.timed():` only"


def _alike(layers: Mapping[str, LayerStats]) -> Iterator[tuple[str, list[LayerStats]]]:
    """Layers whose names differ in a number and whose counts are equal, under one name."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, x in layers.items():
        counts = (x.kernel, x.forwards, x.backwards, x.tiles, x.messages, x.bytes_sent)
        groups.setdefault(counts, []).append(name)
    for names in groups.values():
        for folded, places in fold_names(names):
            yield folded, [layers[names[i]] for i in places]


def _row(name: str, found: Sequence[LayerStats]) -> tuple[str, ...]:
    """Of one layer; times are the mean of all."""
    one, count = found[0], len(found)
    mean = dataclasses.replace(
        one,
        compute_s=sum(x.compute_s for x in found) / count,
        wait_s=sum(x.wait_s for x in found) / count,
    )
    times = f"{count} x" if count > 1 else ""
    return name, times, *_cells(mean, max(1, one.forwards))


def _cells(x: LayerStats, calls: int) -> tuple[str, ...]:
    return (
        x.kernel, f"{x.forwards}", f"{x.messages / calls:.4g}", format_bytes(x.bytes_sent / calls),
        format_ms(x.compute_s * 1e3 / calls) if x.compute_s else "-",
        format_ms(x.wait_s * 1e3 / calls) if x.wait_s else "-",
    )  # fmt: skip
