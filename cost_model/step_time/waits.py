"""What messages cost a step beyond their own time.

Ranks that compute between two messages are never quite together, and on a CPU the thread that sends
waits for a core that computes. Messages that follow each other at once, as a calibration of links
times them, show nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ringfx.cost_model.prediction.profile import Profile
from ringfx.ir.plan import LayerPlan
from ringfx.ir.step_time import WAITS, StepPart
from ringfx.ir.values import Collective

__all__ = ["waits"]

AT_EACH_CALL = 1
"""Ranks compare what they were given."""


def waits(
    layers: Iterable[LayerPlan], moves: Iterable[Collective], world_size: int, profile: Profile
) -> Sequence[StepPart]:
    """Of all messages of a step; an attention waits once in each direction, whatever it sends."""
    if world_size == 1 or not profile.message_wait_us:
        return ()
    sending = [layer for layer in layers if layer.communication_ms]
    backward = [move.in_backward for move in moves]
    before = AT_EACH_CALL + len(sending) + backward.count(False)
    behind = sum(layer.site.trains for layer in sending) + backward.count(True)
    each_ms = profile.message_wait_us / 1e3
    return (
        StepPart(
            cause=WAITS, forward_ms=each_ms * before, backward_ms=each_ms * behind, tokens=0,
            is_split=False,
        ),
    )  # fmt: skip
