"""Which ranks split one sequence together, and which of these groups a rank belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringfx.errors import InvalidArgument

__all__ = ["SequenceGroups"]


@dataclass(frozen=True, kw_only=True)
class SequenceGroups:
    """Groups of ranks of which each splits sequences of its own."""

    sequence: DeviceMesh | None = None
    """The ranks that split a sequence with this one, of one dimension; None: all there are."""
    every: DeviceMesh | None = None
    """All ranks, where there are several groups: data, then sequence."""
    data: dist.ProcessGroup | None = None
    """The ranks with the same place in the other groups; None: there is one group."""
    data_rank: int = 0
    """Which of the groups this rank belongs to."""
    data_size: int = 1
    """How many groups there are."""

    @staticmethod
    def of(
        mesh: DeviceMesh | None = None,
        sequence_ranks: int | None = None,
        device_type: str = "cpu",
    ) -> SequenceGroups:
        """From a mesh whose last dimension is the sequence's, or from the size of a group.

        Parameters
        ----------
        mesh
            Of one dimension, with all ranks, or of two: data, then sequence.
        sequence_ranks
            Without a mesh: so many consecutive ranks share a sequence; None: all.
        device_type
            Of the mesh that is made for ``sequence_ranks``.

        Raises
        ------
        InvalidArgument
            Both were given, the mesh is of another kind, or the ranks cannot be parted so.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if mesh is not None and sequence_ranks is not None:
            raise InvalidArgument("mesh and sequence_ranks say the same. Do: pass one of them.")
        if mesh is None:
            size = _checked(sequence_ranks, world_size)
            if size == world_size:
                return SequenceGroups()
            shape = (world_size // size, size)
            mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "sequence"))
        return _of_mesh(mesh, world_size)


def _checked(sequence_ranks: int | None, world_size: int) -> int:
    if sequence_ranks is None:
        return world_size
    given: Any = sequence_ranks
    if not isinstance(given, int) or isinstance(given, bool) or given < 1 or world_size % given:
        raise InvalidArgument(
            f"sequence_ranks={given!r} does not divide the {world_size} ranks. Do: pass one of "
            f"{[n for n in range(1, world_size + 1) if world_size % n == 0]}."
        )
    return given


def _of_mesh(mesh: DeviceMesh, world_size: int) -> SequenceGroups:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim > 2 or mesh.size() != world_size:
        what = f"{tuple(mesh.shape)}" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise InvalidArgument(
            f"mesh must be a DeviceMesh of all {world_size} ranks, of one dimension or of two "
            f"(data, then sequence), not {what}. Do: pass sequence_ranks=N, or "
            "init_device_mesh(device, (data, sequence))."
        )
    if mesh.ndim == 1:
        return SequenceGroups(sequence=mesh)
    data, sequence = mesh.mesh_dim_names or (0, 1)
    if mesh.size(0) == 1:
        return SequenceGroups(sequence=_dim(mesh, sequence))
    return SequenceGroups(
        sequence=_dim(mesh, sequence), every=mesh, data=mesh.get_group(data),
        data_rank=mesh.get_local_rank(data), data_size=mesh.size(0),
    )  # fmt: skip


def _dim(mesh: DeviceMesh, name: Any) -> DeviceMesh:
    if isinstance(name, str):
        return mesh[name]
    return DeviceMesh.from_group(mesh.get_group(name), mesh.device_type)
