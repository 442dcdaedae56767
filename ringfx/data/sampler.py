"""A sampler that gives all ranks of a sequence group the same examples."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Dataset, DistributedSampler

from ringfx.data.groups import SequenceGroups

__all__ = ["SequenceGroupSampler"]

T = TypeVar("T")


class SequenceGroupSampler(DistributedSampler[T]):
    """torch's ``DistributedSampler`` over sequence groups instead of ranks.

    Ranks that split one sequence get the same indices, each group its own part of the data::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "sequence"))
        model = ringfx.optimize(model, mesh=mesh["sequence"])
        loader = DataLoader(dataset, sampler=SequenceGroupSampler(dataset, mesh=mesh))

    Call ``set_epoch`` before each epoch, as for any ``DistributedSampler``.

    Parameters
    ----------
    mesh
        All ranks: of one dimension, which is the sequence's, or data, then sequence.
    sequence_ranks
        Instead of a mesh: so many consecutive ranks share a sequence; None: all ranks do.
    options
        Of ``DistributedSampler``: ``shuffle``, ``seed``, ``drop_last``.

    Raises
    ------
    InvalidArgument
        The ranks cannot be parted so.
    """

    def __init__(
        self,
        dataset: Dataset[T],
        *,
        mesh: DeviceMesh | None = None,
        sequence_ranks: int | None = None,
        **options: Any,
    ) -> None:
        groups = SequenceGroups.of(mesh, sequence_ranks)
        super().__init__(
            dataset, num_replicas=groups.data_size, rank=groups.data_rank, **options
        )  # fmt: skip
