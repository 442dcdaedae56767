"""Batches whose sequences the ranks load in parts."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringfx.errors import InvalidArgument
from ringfx.torch_compat.pytree import tree_flatten, tree_unflatten

__all__ = ["whole_batch"]

T = TypeVar("T")


def whole_batch(batch: T, *, mesh: DeviceMesh | None = None, dim: int = 1) -> T:
    """The batch of whole sequences, of which each rank has loaded a part.

    ::

        batch = {"input_ids": my_part, "labels": my_part}      # (batch, tokens of this rank)
        loss = model(**ringfx.data.whole_batch(batch)).loss    # (batch, all tokens)

    Every tensor of more than ``dim`` dimensions is joined along ``dim``, parts in the order of
    ranks; they may differ in length. Others stay as they are. What travels is a token's number, a
    few bytes, where a token's activations take tens of kilobytes a layer. No gradient goes through.

    Parameters
    ----------
    batch
        Tensors in any nest of dicts, lists and tuples, alike on all ranks.
    mesh
        The sequence's ranks; None: all.
    dim
        That of the tokens.

    Raises
    ------
    InvalidArgument
        The ranks' batches differ in their structure, in types or in other dimensions, or a tensor
        requires a gradient.
    """
    if not dist.is_initialized():
        return batch
    group = None if mesh is None else mesh.get_group()
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return batch
    leaves, tree = tree_flatten(batch)
    parts = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() > dim]
    mine = [(tuple(leaves[i].shape), str(leaves[i].dtype)) for i in parts]
    if trained := [tuple(leaves[i].shape) for i in parts if leaves[i].requires_grad]:
        raise InvalidArgument(
            f"a tensor {trained[0]} of the batch requires a gradient, which would not reach it. "
            "Do: pass whole sequences to the model; it gives each rank complete gradients."
        )
    said: list[Any] = [None] * ranks
    dist.all_gather_object(said, (str(tree), mine), group=group)
    _refuse_other(said, dim)
    for number, i in enumerate(parts):
        lengths = [shapes[number][0][dim] for _, shapes in said]
        leaves[i] = _joined(leaves[i], lengths, dim, group)
    return tree_unflatten(leaves, tree)  # type: ignore[no-any-return]


def _refuse_other(said: list[Any], dim: int) -> None:
    def but_for_tokens(of_rank: Any) -> Any:
        tree, tensors = of_rank
        return tree, [((*shape[:dim], *shape[dim + 1 :]), dtype) for shape, dtype in tensors]

    first = but_for_tokens(said[0])
    for rank, other in enumerate(said):
        if but_for_tokens(other) != first:
            raise InvalidArgument(
                f"whole_batch: rank 0 has a batch of {said[0][1]}, rank {rank} one of {other[1]}: "
                f"they may differ along dimension {dim} alone. Do: load parts of the same examples."
            )


def _joined(part: Tensor, lengths: list[int], dim: int, group: dist.ProcessGroup | None) -> Tensor:
    shape = [*part.shape]
    shape[dim] = max(lengths)
    padded = part.new_zeros(shape)
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded, group=group)
    return torch.cat([x.narrow(dim, 0, n) for x, n in zip(found, lengths, strict=True)], dim)
