"""What a step of a program holds, with some of its regions in chunks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.fx import Node

from ringfx.comm.state_ranks import StateRanks
from ringfx.comm.world import World
from ringfx.compile.settings import Settings
from ringfx.compile.states import has_rows
from ringfx.cost_model.peak_memory.alive import Alive
from ringfx.cost_model.peak_memory.peak import Step, step_of
from ringfx.cost_model.step_time.step import Timed
from ringfx.ir.values import Captured
from ringfx.passes.chunks import outlined
from ringfx.passes.chunks.outline import Outlined
from ringfx.passes.chunks.sizes import Sized
from ringfx.passes.place import PlacementMap

__all__ = ["StepInChunks", "alive_over", "sharded_states", "step_in_chunks"]


@dataclass(frozen=True, eq=False, kw_only=True)
class StepInChunks:
    """A step with some regions as calls that run in chunks."""

    outline: Outlined
    step: Step


def step_in_chunks(
    captured: Captured,
    in_chunks: Sequence[Sized],
    placement: PlacementMap,
    time: Timed | None,
    settings: Settings,
    world: World,
) -> StepInChunks:
    """The step, whatever its strategies and the ranks that share its states."""
    lines = placement.lines
    carries = placement.is_sharded if world.size > 1 else lines.carries_one
    outline = outlined(captured, in_chunks)

    def again_ms(nodes: Collection[Node]) -> float:
        assert time is not None
        originals = [x for n in nodes for x in outline.originals(n)]
        return world.size * time.again(originals).total_ms

    step = step_of(
        outline.captured, carries_tokens=outline.of_original(carries, False),
        power=outline.of_original(lines.power, 0), world_size=world.size,
        compiler=settings.compiler, again_ms=again_ms if time else None,
    )  # fmt: skip
    return StepInChunks(outline=outline, step=step)


def alive_over(chunked: StepInChunks, over: StateRanks, settings: Settings) -> Alive:
    """What is alive when, with parameters and their states sharded over these ranks."""
    step = chunked.step
    states = sharded_states(step.captured, over)
    return step.alive(optimizer=settings.optimizer, states=states, state_ranks=over)


def sharded_states(captured: Captured, over: StateRanks) -> tuple[int, ...]:
    """The parameters of which each rank holds its rows: by their number among the inputs."""
    if over.ranks == 1:
        return ()
    inputs = captured.graph_module.graph.find_nodes(op="placeholder")
    return tuple(
        i for i, n in enumerate(inputs) if captured.is_parameter[i] and has_rows(n.meta["val"])
    )
