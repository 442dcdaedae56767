"""Parameters that parallelize_module or transformers' tp_plan spread over other ranks.

Each rank's program is made for the parts that it has, and splits the sequence of those over the
sequence's ranks; the messages of tensor parallelism stand in it where its modules' hooks place
values anew (``ringfx.passes.tensor_parallel``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.fx import GraphModule, Node

from ringfx.comm.world import World
from ringfx.errors import InvalidArgument
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.parallel_calls import RESIZING
from ringfx.torch_compat.distributed import (
    UnknownPlacement,
    alias_of,
    group_named,
    is_dtensor,
    is_mesh,
    placed,
)
from ringfx.units.argument import Argument

if TYPE_CHECKING:
    from ringfx.compile.pipeline import Lowered

__all__ = ["NO_PARTS", "Parts", "name_groups", "spread_tokens"]


@dataclass(frozen=True)
class Parts:
    """Which inputs of a program are DTensors, and which are no data."""

    dtensors: frozenset[int] = frozenset()
    meshes: frozenset[int] = frozenset()
    """Inputs that Dynamo passes along for DTensors' sake."""

    @staticmethod
    def of(inputs: Sequence[Any], names: Sequence[str], world: World) -> Parts:
        """
        Raises
        ------
        InvalidArgument
            A DTensor is spread in a way, or over ranks, that ringfx has no program for.
        """
        found = {i for i, value in enumerate(inputs) if is_dtensor(value)}
        for i in found:
            _refuse(names[i], inputs[i], world)
        return Parts(frozenset(found), frozenset(i for i, v in enumerate(inputs) if is_mesh(v)))

    def take(self, index: int, value: Any) -> Any:
        """An input as the program takes it; differentiable."""
        if index in self.dtensors:
            return value.to_local()
        return None if index in self.meshes else value

    def owners(self, given: Sequence[Any], taken: Sequence[Any]) -> list[Any]:
        """The parameters that gradients belong to: DTensors themselves, not their parts."""
        return [given[i] if i in self.dtensors else x for i, x in enumerate(taken)]


NO_PARTS = Parts()


def _refuse(name: str, value: Any, world: World) -> None:
    where = f"{name} {tuple(value.shape)} is a DTensor on {value.device_mesh}"
    try:
        found = placed(value)
    except UnknownPlacement as unknown:
        raise InvalidArgument(
            f"{where}, placed as {unknown}, but ringfx knows Replicate(), Shard(dim) and "
            "Partial(sum) over one mesh dimension. Do: parallelize_module(model, mesh['tp'], ...) "
            "and ringfx.optimize(model, mesh=mesh['cp']); instead of DTensors of your own over "
            f"both, pass {Argument('shard_states', True)}."
        ) from unknown
    assert found is not None
    if found.dim is not None and found.shape[found.dim] % found.ranks:
        raise InvalidArgument(
            f"{where}, whose dimension {found.dim} of {found.shape[found.dim]} is spread over "
            f"{found.ranks} ranks: parts must be equal. Do: choose a size that {found.ranks} "
            "divides, or leave its module out of the parallelize plan."
        )
    if world.size < 2:
        return
    common = set(_ranks(found.group)) & set(_ranks(world.group))
    if len(common) > 1:
        raise InvalidArgument(
            f"{where} (from parallelize_module or tp_plan), and the sequence is to be split over "
            f"ranks {_ranks(world.group)}: ranks {sorted(common)} are in both, so they hold "
            "different parts of it and cannot share a sequence. Do: make a mesh of two "
            "dimensions, init_device_mesh(device, (cp, tp), mesh_dim_names=('cp', 'tp')), give "
            "mesh['tp'] to parallelize_module and mesh['cp'] to ringfx.optimize(model, mesh=...); "
            f"or leave parallelize_module out and pass {Argument('shard_states', True)}."
        )


def spread_tokens(lowered: Lowered) -> list[str]:
    """What to say where tensor parallelism cuts or joins tokens: they are whole there."""
    lines, graph = lowered.local.placement.lines, lowered.captured.graph_module.graph
    return [
        f"{describe_node(node)}: tensor parallelism spreads tokens over its own ranks "
        "(SequenceParallel, or a layout Shard(1)), which the sequence's ranks hold whole there. "
        "Do: leave SequenceParallel and such layouts out of the parallelize plan; the sequence is "
        "split already"
        for node in graph.nodes
        if node.target in RESIZING
        and any(node.args[3] in lines.dims_with_tokens(x) for x in (node.args[0], node))
    ]


def name_groups(gm: GraphModule, world: World) -> None:
    """Give the groups of the model's own collectives names that are the same on all ranks.

    Raises
    ------
    InvalidArgument
        A group has several of the ranks that the sequence is split over: they hold different
        tokens, and what a collective joins would not be what it joins in the unsplit model.
    """
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        calls = [n for n in module.graph.nodes if _is_collective(n)]
        for node in calls:
            group = node.args[-1]
            if str(group).startswith("ringfx: "):
                continue
            common = set(_ranks(group)) & set(_ranks(world.group)) if world.size > 1 else set()
            if len(common) > 1:
                raise InvalidArgument(
                    f"{describe_node(node)}: the model's own {node.target} is over ranks "
                    f"{_ranks(group)}, and the sequence is to be split over ranks "
                    f"{_ranks(world.group)}: ranks {sorted(common)} are in both, and would join "
                    "other tokens than those of the unsplit model. Do: give the model another "
                    "group, or ringfx.optimize(model, mesh=mesh['cp']) one of other ranks."
                )
            node.args = (*node.args[:-1], alias_of(group))
        if calls:
            module.recompile()


def _is_collective(node: Node) -> bool:
    """Whether it is one of torch's functional collectives, which take a group's name last."""
    called = node.op == "call_function" and str(node.target).startswith("_c10d_functional.")
    return called and len(node.args) > 1 and isinstance(node.args[-1], str)


def _ranks(group: str) -> list[int]:
    return dist.get_process_group_ranks(group_named(group)) if group else [dist.get_rank()]
