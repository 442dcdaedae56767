"""The time of a program outside attention, and of a whole step of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ringfx.comm.state_ranks import StateRanks
from ringfx.compile.settings import Settings
from ringfx.cost_model import Profile
from ringfx.cost_model.step_time.step import Timed, attention_gflops, optimizer_parts, timed
from ringfx.cost_model.step_time.waits import waits
from ringfx.ir.plan import LayerPlan
from ringfx.ir.step_time import StepTime
from ringfx.ir.values import Captured, Collective
from ringfx.passes.chunks.sizes import Sized
from ringfx.passes.place import PlacementMap

__all__ = ["run_again", "step_time", "time_of_program"]


def run_again(in_chunks: Sequence[Sized]) -> Sequence[Sized]:
    """Regions that backward computes again."""
    return [x for x in in_chunks if x.region.trains and not x.region.is_loss]


def time_of_program(
    captured: Captured, placement: PlacementMap, profile: Profile, settings: Settings
) -> Timed | None:
    """What every operator takes; None where the profile does not know."""
    lines = placement.lines
    ranks = max((line.layout.world_size for line in lines.lines), default=1)
    return timed(
        captured, carries_tokens=placement.is_sharded if ranks > 1 else lines.carries_one,
        power=lines.power, world_size=ranks, profile=profile, compiler=settings.compiler,
    )  # fmt: skip


def step_time(
    time: Timed | None,
    captured: Captured,
    in_chunks: Sequence[Sized],
    layers: Sequence[LayerPlan],
    moves: Sequence[Collective],
    states: Sequence[int],
    state_ranks: StateRanks,
    settings: Settings,
) -> StepTime | None:
    """What a step takes outside attention."""
    if time is None:
        return None
    further = optimizer_parts(
        captured, optimizer=settings.optimizer, states=states, state_ranks=state_ranks,
        profile=time.profile,
    )  # fmt: skip
    waiting = waits(layers, moves, time.world_size, time.profile)
    again = [time.again(x.region.nodes) for x in run_again(in_chunks)]
    sites = [layer.site for layer in layers]
    whole = {i for i, layer in enumerate(layers) if layer.is_replicated}
    step = time.step(sites, [*further, *again, *waiting])
    return replace(step, attention_gflops=attention_gflops(sites, whole, time.world_size))
