"""The ranks that a sequence is split over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringfx.errors import InvalidArgument
from ringfx.torch_compat.distributed import group_named

__all__ = ["World", "process_group", "several_machines", "several_processes"]


@dataclass(frozen=True)
class World:
    """A process group as plain values; ``group`` is "" for one rank without a process group."""

    size: int
    rank: int = 0
    group: str = ""

    @staticmethod
    def of(mesh: Any) -> World:
        """From a one-dimensional DeviceMesh, a process group, or None for all ranks.

        Raises
        ------
        InvalidArgument
            When the mesh is something else or has several dimensions; when a launcher has started
            several processes and no process group joins them.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if mesh is None:
                _refuse_started_alone()
                return World(1)
            raise InvalidArgument(
                f"mesh={mesh!r} was given, but torch.distributed is not initialised. "
                "Do: call torch.distributed.init_process_group() first (torchrun sets its "
                "environment), or leave mesh out to run on one rank."
            )
        group = _group(mesh)
        if dist.get_rank(group) < 0:
            raise InvalidArgument(_NOT_A_MEMBER)
        size = dist.get_world_size(group)
        return World(size, dist.get_rank(group), group.group_name if size > 1 else "")


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return group_named(name)


def several_processes() -> bool:
    """Whether this process is one of several, by torch.distributed or by its launcher."""
    return _processes() > 1


def _processes() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    started = _started()
    return 1 if started is None else started[1]


def several_machines() -> bool:
    """Whether there may be processes that see other files: a launcher says how many are here."""
    processes = _processes()
    here = [os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")]
    return processes > 1 and str(processes) not in here


def _started() -> tuple[str, int] | None:
    """How many processes a launcher says it started, and where; None for one."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        said = os.environ.get(name, "")
        if said.isdecimal() and int(said) > 1:
            return name, int(said)
    return None


def _refuse_started_alone() -> None:
    """Each alone would run the model whole."""
    started = _started()
    if started is not None:
        name, said = started
        raise InvalidArgument(
            f"{name}={said} says that {said} processes were started, but torch.distributed is not "
            "initialised, so each process would run the full sequence. Do: call "
            "torch.distributed.init_process_group() before the model's first call, or unset "
            f"{name} to run on one rank."
        )


_NOT_A_MEMBER = (
    "this rank is not in the mesh or group that was given. Do: call ringfx.optimize only on the "
    "ranks that share the sequence, each with its own group of a mesh, such as mesh['sp']."
)


def _group(mesh: Any) -> dist.ProcessGroup:
    if mesh is None:
        world = dist.group.WORLD
        assert world is not None
        return world
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise InvalidArgument(
                f"mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names or tuple(mesh.shape)}, but "
                "the sequence is split over one. Do: pass one of them, such as mesh['sp']."
            )
        return mesh.get_group()
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if mesh == dist.GroupMember.NON_GROUP_MEMBER:
        raise InvalidArgument(_NOT_A_MEMBER)
    raise InvalidArgument(
        f"mesh is a {type(mesh).__name__}, {mesh!r}. Do: pass a one-dimensional DeviceMesh such as "
        "mesh['sp'], a ProcessGroup, or None for all ranks."
    )
