"""Options to compute a layer again in backward instead of keeping its values.

Without attention, whose output and logsumexp are kept and whose messages are sent once; or with it,
where the memory of these is needed as well. What is still kept, the hidden states between layers
and attention's output, may wait in the host's memory, which takes its link's time there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, TypeAlias

from ringfx.cost_model.choice.budget import Menu
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.cost_model.prediction.profile import Profile
from ringfx.ir.memory_plan import MemoryTimeline
from ringfx.ir.memory_timeline import SegmentBytes, segment_bytes
from ringfx.ir.values import AttentionSite

__all__ = ["OFFLOAD", "RECOMPUTE", "Host", "Offload", "Recompute", "with_recompute"]

Recompute: TypeAlias = Literal["auto", "none", "layers", "attention"]
"""``auto``: the layers that a budget demands; ``layers``: all, without their attention;
``attention``: all, with it."""

RECOMPUTE: tuple[str, ...] = ("auto", "none", "layers", "attention")

Offload: TypeAlias = Literal["auto", "none", "all"]
"""Of what layers that are computed again keep: ``auto``: what a budget demands; ``all``: all that
can be."""

OFFLOAD: tuple[str, ...] = ("auto", "none", "all")


@dataclass(frozen=True, kw_only=True)
class Host:
    """The host's memory, as one rank may use it."""

    ms_per_byte: float = 0.0
    """Of sending a byte there, or back."""
    room: float = float("inf")
    """Bytes of one rank."""
    always: bool = False
    """Whether all that can wait there does."""

    @staticmethod
    def of(profile: Profile, offload: Offload) -> Host | None:
        """None: nothing is offloaded; by itself nothing if the profile does not know the host."""
        speed, room = profile.host_gbytes_per_s, profile.host_gbytes
        if offload == "none" or (offload == "auto" and not (speed and room)):
            return None
        return Host(
            ms_per_byte=1e-6 / speed if speed else 0.0,
            room=1e9 * room if room else float("inf"),
            always=offload == "all",
        )


def with_recompute(
    menus: Sequence[Menu],
    sites: Sequence[AttentionSite],
    world_size: int,
    timeline: MemoryTimeline,
    recompute: Recompute,
    host: Host | None = None,
) -> list[Menu]:
    """The menus with each option several times: its layer kept, and computed again without and with
    attention, what is kept for that offloaded or not; cheapest first.

    What computing again takes falls with the ranks and grows with the length.
    """
    numbers = {layer.node: i for i, layer in enumerate(timeline.layers)}
    segments = {segment.layer: i for i, segment in enumerate(timeline.segments)}
    seq_len = max((site.kv_len for site in sites), default=1)
    sizes = segment_bytes(timeline, world_size=world_size, seq_len=seq_len)
    made = cache(partial(_options, recompute=recompute, host=host))  # equal layers have one menu
    room = 0.0 if host is None else host.room
    found: list[Menu] = []
    for site, menu in zip(sites, menus, strict=True):
        number = segments.get(numbers.get(site.node, -1))
        if number is None:
            found.append(tuple(menu))
            continue
        ms = timeline.segments[number].again_ms * seq_len / timeline.seq_len / world_size
        most = sizes[number].moved + max((o.output_bytes for o in menu), default=0)
        found.append(made(menu, sizes[number], ms, min(room, most)))
        room -= max((o.host_bytes for o in found[-1]), default=0)
    return found


def _options(
    menu: Menu,
    sizes: SegmentBytes,
    again_ms: float,
    room: float,
    *,
    recompute: Recompute,
    host: Host | None,
) -> Menu:
    """``room``: bytes that the layers before leave in the host's memory."""
    offered = _offered(menu, recompute, sizes, again_ms)
    if host is not None:
        moved = [_offloaded(o, sizes.moved, host) for o in offered if o.recomputed]
        moved = [o for o in moved if 0 < o.host_bytes <= room]
        if moved and host.always:
            offered = [o for o in offered if not o.recomputed]
        offered += moved
    return tuple(sorted(offered, key=lambda o: o.cost_ms))


def _offered(
    menu: Menu, recompute: Recompute, sizes: SegmentBytes, again_ms: float
) -> list[Prediction]:
    kept = [replace(o, layer_bytes=sizes.kept) for o in menu]
    again = [replace(o, recomputed=True, again_ms=again_ms, layer_bytes=sizes.again) for o in menu]
    whole = [replace(o, attention_again=True, again_ms=again_ms + o.forward_ms) for o in again]
    by_word = {"none": kept, "layers": again, "attention": whole}
    return by_word.get(recompute, [*kept, *again, *whole])


def _offloaded(option: Prediction, moved: int, host: Host) -> Prediction:
    """With what the layer hands on in the host's memory, and attention's output if it is kept."""
    output = 0 if option.attention_again else option.output_bytes
    return replace(
        option,
        offloaded=True,
        host_bytes=moved + output,
        host_result_bytes=output,
        offload_ms=2 * (moved + output) * host.ms_per_byte,
        layer_bytes=option.layer_bytes - moved,
    )
