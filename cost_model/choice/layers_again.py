"""Options to compute a layer again in backward instead of keeping its values.

Without attention, whose output and logsumexp are kept and whose messages are sent once; or with it,
where the memory of these is needed as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from ringfx.cost_model.choice.budget import Menu
from ringfx.ir.memory_plan import MemoryTimeline
from ringfx.ir.memory_timeline import kept_bytes
from ringfx.ir.values import AttentionSite

__all__ = ["RECOMPUTE", "Recompute", "with_recompute"]

Recompute: TypeAlias = Literal["auto", "none", "layers", "attention"]
"""``auto``: the layers that a budget demands; ``layers``: all, without their attention;
``attention``: all, with it."""

RECOMPUTE: tuple[str, ...] = ("auto", "none", "layers", "attention")


def with_recompute(
    menus: Sequence[Menu],
    sites: Sequence[AttentionSite],
    world_size: int,
    timeline: MemoryTimeline,
    recompute: Recompute,
) -> list[Menu]:
    """The menus with each option thrice: its layer kept, and computed again without and with
    attention; cheapest first.

    What computing again takes falls with the ranks and grows with the length.
    """
    numbers = {layer.node: i for i, layer in enumerate(timeline.layers)}
    segments = {segment.layer: i for i, segment in enumerate(timeline.segments)}
    seq_len = max((site.kv_len for site in sites), default=1)
    found = []
    for site, menu in zip(sites, menus, strict=True):
        number = segments.get(numbers.get(site.node, -1))
        if number is None or recompute == "none":
            found.append(tuple(menu))
            continue
        size = {
            again: kept_bytes(timeline, number, again=again, world_size=world_size, seq_len=seq_len)
            for again in (False, True)
        }
        ms = timeline.segments[number].again_ms * seq_len / timeline.seq_len / world_size
        kept = [replace(o, layer_bytes=size[False]) for o in menu]
        again = [replace(o, recomputed=True, again_ms=ms, layer_bytes=size[True]) for o in menu]
        whole = [replace(o, attention_again=True, again_ms=ms + o.forward_ms) for o in again]
        offered = {"layers": again, "attention": whole}.get(recompute, [*kept, *again, *whole])
        found.append(tuple(sorted(offered, key=lambda o: o.cost_ms)))
    return found
