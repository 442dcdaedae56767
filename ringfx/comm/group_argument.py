"""What a user may pass as ``group``, as the name and the size that operators take."""

from __future__ import annotations

from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringfx.errors import InvalidArgument

__all__ = ["Group", "name_and_size"]

Group: TypeAlias = dist.ProcessGroup | DeviceMesh | None


def name_and_size(group: Group) -> tuple[str, int]:
    """The group's name as torch.distributed knows it, and how many ranks it has.

    Parameters
    ----------
    group
        A process group, a one-dimensional device mesh (``mesh["sequence"]``), or None for all
        ranks; None without an initialised process group is one rank alone: ``("", 1)``.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return "", 1
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InvalidArgument(
                f"group: the mesh has {group.ndim} dims {group.mesh_dim_names}. "
                'Do: pass one of them, such as mesh["sequence"].'
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidArgument(
            f"group: this rank is not in the group, or {type(group).__name__} is not a group. Do: "
            "pass a process group that contains this rank, one dim of a mesh, or None for all "
            "ranks."
        )
    return group.group_name, group.size()
