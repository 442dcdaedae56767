"""``as_strided`` by what it reads, not by where that lies in memory.

Sizes and strides of the call are numbers that the user's code took from the tensor as it lies in
the unsplit program. A rank's tensor, or a gathered one, may lie otherwise, and the same numbers
would pick other elements. So the call becomes views of the elements in the order of memory:
slices, and windows where neighbours overlap (``x.as_strided`` in sliding attention); else an index.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ringfx.errors import CaptureRefused

__all__ = ["as_read", "as_views", "by_index", "refuse_scatter"]

Tensor = torch.Tensor


def as_views(
    x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """``aten.as_strided`` as other views, or as itself on a row of elements, from its first.

    Raises
    ------
    CaptureRefused
        It reads memory that is not of ``x``, or ``x`` has gaps or repeats in memory.
    """
    offset = _offset(x, size, stride, storage_offset)
    axes = _axes(size, stride, x.numel() - offset)
    if axes is not None:
        return _windows(_row(x)[offset:], axes, size, stride)
    if storage_offset is None and x.dim() == 1:
        return NotImplemented  # as a view, through which a write is refused; later by_index
    return _row(x)[offset:].as_strided(size, stride)


def as_read(
    x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """``aten.as_strided`` where nothing is written: as views, else by an index."""
    found = as_views(x, size, stride, storage_offset)
    return by_index(x, size, stride, storage_offset) if found is NotImplemented else found


def by_index(
    x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """The same elements, picked by a table of their numbers: correct wherever ``x`` lies."""
    at: Any = _offset(x, size, stride, storage_offset)
    for dim, (count, step) in enumerate(zip(size, stride, strict=True)):
        steps = torch.arange(count, device=x.device) * step
        at = at + steps.reshape([count if d == dim else 1 for d in range(len(size))])
    if not isinstance(at, Tensor):  # no dimensions: one element
        return _row(x)[at]
    return _row(x)[at.expand(size)]


def refuse_scatter(x: Tensor, src: Tensor, *args: Any) -> Tensor:
    raise CaptureRefused(
        f"as_strided_scatter on a tensor of shape {tuple(x.shape)} writes where elements lie in "
        "memory, and a rank's tensors lie otherwise. Do: write through slices or index_put."
    )


def _offset(x: Tensor, size: Sequence[int], stride: Sequence[int], given: int | None) -> int:
    """Where it starts among the elements of ``x`` in the order of memory."""
    offset = 0 if given is None else given - int(x.storage_offset())
    reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    advice = "Do: take slices, unfold or index instead, or call x.contiguous() before."
    if not _permuted(x).is_contiguous():
        raise CaptureRefused(
            f"as_strided on a tensor of shape {tuple(x.shape)} with strides {x.stride()}, which "
            f"has gaps or repeats in memory: a rank's tensor lies otherwise. {advice}"
        )
    if offset < 0 or (0 not in size and reach >= max(x.numel(), 1)):
        raise CaptureRefused(
            f"as_strided({tuple(size)}, {tuple(stride)}) on a tensor of shape {tuple(x.shape)} "
            f"reads elements {offset} to {reach} of {x.numel()} in memory: it reads memory that is "
            f"not of this tensor, of which a rank has only a part. {advice}"
        )
    return offset


def _permuted(x: Tensor) -> Tensor:
    """Dimensions in the order of memory, the widest step first."""
    steps = x.stride()
    order = sorted(range(x.dim()), key=lambda d: (-steps[d], x.shape[d] != 1, d))
    return x.permute(order)


def _row(x: Tensor) -> Tensor:
    return _permuted(x).reshape(-1)


@dataclass(kw_only=True)
class _Axis:
    """Equal steps through memory: some neighbours, or windows of them."""

    unit: int
    """Elements from one place to the next."""
    size: int
    """Places that are read: all, or those of a window."""
    step: int = 0
    """Places from a window to the next; none: no windows."""
    count: int = 1
    length: int = 0
    """Places that there are."""

    @property
    def reach(self) -> int:
        return (self.count - 1) * self.step + self.size


def _axes(size: Sequence[int], stride: Sequence[int], total: int) -> list[_Axis] | None:
    """The axes of memory that sizes and strides walk along, outermost first; None: no such."""
    walked = sorted((s, n) for n, s in zip(size, stride, strict=True) if n != 1)
    if any(s == 0 or n == 0 for s, n in walked) or len({s for s, _ in walked}) < len(walked):
        return None
    axes: list[_Axis] = []
    for step, count in walked:
        last = axes[-1] if axes else None
        if last is not None and step % last.unit:
            return None
        if last is None or step >= last.unit * last.size:
            axes.append(_Axis(unit=step, size=count))
        elif last.step == 0:  # closer than what is read there: windows that overlap
            last.step, last.count = step // last.unit, count
        else:
            return None
    for inner, outer in itertools.pairwise(axes):
        if outer.unit % inner.unit:
            return None
        inner.length = outer.unit // inner.unit
    if axes:
        axes[-1].length = total // axes[-1].unit or 1
    return axes[::-1] if all(axis.reach <= axis.length for axis in axes) else None


def _windows(row: Tensor, axes: Sequence[_Axis], size: Sequence[int], stride: Sequence[int]) -> Any:
    """Views of a row: its axes, cut to what is read, then windows, in the order asked for."""
    if not axes:
        return row[0].reshape(list(size))
    inner = axes[-1].unit
    x = row[: axes[0].length * axes[0].unit].reshape([*(a.length for a in axes), inner])[..., 0]
    found: list[int] = []
    """Strides of the dimensions of x, as the call names them."""
    for dim, axis in enumerate(axes):
        if axis.step:
            x = x.unfold(dim, axis.size, axis.step).narrow(dim, 0, axis.count)
        else:
            x = x.narrow(dim, 0, axis.size)
        found.append(axis.unit * (axis.step or 1))
    found += [axis.unit for axis in axes if axis.step]
    asked = [s for n, s in zip(size, stride, strict=True) if n != 1]
    return x.permute([found.index(s) for s in asked]).reshape(list(size))
