"""Process groups: by name, their store, and what lies below them.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

__all__ = [
    "Placed", "PrefixStore", "Store", "TCPStore", "UnknownPlacement", "alias_of", "backends_of",
    "carry_composable_state", "default_store", "device_types", "flattened", "group_named",
    "is_dtensor", "is_mesh", "like_whole", "local_of", "local_part", "placed", "timeout_of",
]  # fmt: skip


PrefixStore = c10d.PrefixStore
"""A part of a store. torch.distributed has the three under these names too, without types.
Without: ranks on this machine, hearing which rank failed and why."""

Store = c10d.Store
"""Values that the ranks of a group share."""

TCPStore = c10d.TCPStore
"""One that a process serves."""


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that name, as a program holds it. Without: every collective."""
    found: Any = dist.distributed_c10d
    group: dist.ProcessGroup = found._resolve_process_group(name)
    return group


def alias_of(group: str) -> str:
    """Another name for a group of fewer than all ranks, which is the same on all ranks.

    Ranks compare their programs as text, and groups beside the sequence's (those of tensor
    parallelism) have a name of their own on each. Without: tensor parallelism.
    """
    found = group_named(group)
    number = 0
    while True:
        alias = f"ringfx: {found.size()} other ranks, {number}"
        try:
            known = group_named(alias)
        except RuntimeError:
            registry: Any = c10d
            registry._register_process_group(alias, found)
            return alias
        if known is found or known.group_name == found.group_name:
            return alias
        number += 1


def default_store() -> Any:
    """The store of the default group. Without: hearing which rank failed and why."""
    found: Any = dist.distributed_c10d
    return found._get_default_store()


def device_types(group: Any) -> list[torch.device]:
    """Devices for which a group has a backend. Without: its timeout, and aborting NCCL groups."""
    return list(group._device_types)


def backends_of(group: Any) -> list[Any]:
    """The group's backend for each device. Without: its timeout, and aborting NCCL groups."""
    return [group._get_backend(device) for device in device_types(group)]


def timeout_of(group: Any) -> datetime.timedelta | None:
    """How long the group's messages wait, where a backend says it. Without: 30 minutes is taken."""
    for backend in backends_of(group):
        options = getattr(backend, "options", None)
        if options is not None:
            found: datetime.timedelta = options._timeout
            return found
    return None


def flattened(mesh: Any) -> Any:
    """One dimension of all of a DeviceMesh's, in order. Without: states over dp_shard x cp."""
    return mesh._flatten() if mesh.ndim > 1 else mesh


def carry_composable_state(module: torch.nn.Module, twin: torch.nn.Module) -> None:
    """What fully_shard keeps by module object, for another object too. Without: fully_shard."""
    from torch.distributed import _composable_state as states

    state = states._get_module_state(module)
    if state is not None and states._get_module_state(twin) is None:
        states._insert_module_state(twin, state)


@dataclass(frozen=True)
class Placed:
    """Where the elements of a DTensor over one group of ranks are."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dim: int | None
    """The dimension of which each rank has a part; None: each has all."""
    partial: bool
    """The whole is the sum of what the ranks have."""
    group: str
    """The name of their process group in programs."""
    ranks: int

    def __str__(self) -> str:
        if self.partial:
            return "Partial(sum)"
        return "Replicate()" if self.dim is None else f"Shard({self.dim})"


class UnknownPlacement(Exception):
    """A DTensor that is spread over ranks in a way that has no name here."""


def is_dtensor(value: Any) -> bool:
    """Whether it is a tensor that parallelize_module or distribute_tensor made."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def placed(value: Any) -> Placed | None:
    """How a DTensor is placed; None for any other value.

    Raises
    ------
    UnknownPlacement
        Its mesh has more than one dimension, or its placement is none of DTensor's basic ones.
    """
    if not is_dtensor(value):
        return None
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, placements = value.device_mesh, value.placements
    if mesh.ndim != 1:
        raise UnknownPlacement(f"{placements} on a mesh of {mesh.ndim} dimensions")
    (found,) = placements
    is_partial = isinstance(found, Partial) and found.reduce_op == "sum"
    dim = found.dim % value.dim() if type(found) is Shard else None
    if not (is_partial or dim is not None or isinstance(found, Replicate)):
        raise UnknownPlacement(str(found))
    return Placed(
        shape=tuple(value.shape), dim=dim, partial=is_partial,
        group=alias_of(mesh.get_group().group_name), ranks=mesh.size(),
    )  # fmt: skip


def is_mesh(value: Any) -> bool:
    """Whether it is a DeviceMesh, as such or as Dynamo passes it to a program."""
    if not dist.is_available() or isinstance(value, torch.Tensor):
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(getattr(value, "real_obj", value), DeviceMesh)


def local_of(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    given: Any = value
    part: torch.Tensor = given._local_tensor if is_dtensor(value) else value
    return part


def like_whole(part: torch.Tensor, whole: Any) -> torch.Tensor:
    """A part as a DTensor that is placed as another; itself where that is none."""
    if not is_dtensor(whole):
        return part
    from torch.distributed.tensor import DTensor

    found: torch.Tensor = DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False,
        shape=whole.shape, stride=whole.stride(),
    )  # fmt: skip
    return found


def local_part(value: Any) -> torch.Tensor:
    """What this rank holds of a DTensor, as a tensor of its own; a parameter is one still."""
    part: torch.Tensor = value._local_tensor.detach()
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(part, requires_grad=value.requires_grad)
    return part.requires_grad_(value.requires_grad)
