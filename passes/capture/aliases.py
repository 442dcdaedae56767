"""Views as values: how each is made again from its base, and how it is put back into it.

| view of x                          | x after ``view = new``                    |
|------------------------------------|-------------------------------------------|
| reshape, view, squeeze, unflatten  | reshape(new)                              |
| transpose, permute, movedim, mT    | the inverse permutation of new            |
| slice, narrow, split[i], chunk[i]  | slice_scatter(x, new)                     |
| select, unbind[i]                  | where(position == index, new, x)          |
| diagonal                           | diagonal_scatter(x, new)                  |
| the same elements (alias, detach)  | new                                       |
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ringfx.torch_compat.autograd import storage_id
from ringfx.torch_compat.operators import schema_of

__all__ = ["Alias", "Emit", "can_write_back", "storage_of", "write_back"]

aten = torch.ops.aten

Emit = Callable[..., Node]
"""``emit(target, *args)`` adds a call to the new program."""


@dataclass(eq=False, kw_only=True)
class Alias:
    """One value of the program that is, or shares memory with, a value that may be written."""

    current: Node
    """What stands for it now, in the new program."""
    made_by: Node
    """The call of the old program that made it."""
    parent: Alias | None = None
    """What it is a view of."""
    detached: bool = False
    """Made without gradients: it shows new values, and passes no gradient."""
    children: list[Alias] = field(default_factory=list)
    last_use: int = -1

    @property
    def root(self) -> Alias:
        return self if self.parent is None else self.parent.root

    def needed_after(self, time: int) -> bool:
        return self.last_use > time or any(c.needed_after(time) for c in self.children)


def storage_of(value: object) -> int | None:
    """Identity of the memory behind a tensor; fake tensors share it as real ones do."""
    if not isinstance(value, torch.Tensor) or value.is_sparse:
        return None
    return storage_id(value)


def same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage are the same view of it."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
    )


def can_write_back(alias: Alias) -> bool:
    """Whether a new value of this view can be put back into its parent."""
    assert alias.parent is not None
    if same_elements(alias.made_by.meta["val"], alias.parent.made_by.meta["val"]):
        return True
    view, _ = _view_of(alias.made_by)
    return view.target in _PUT


def write_back(emit: Emit, alias: Alias, new: Node) -> Node:
    """The parent's new value once this view holds ``new``."""
    assert alias.parent is not None
    old = alias.parent.made_by.meta["val"]
    if same_elements(alias.made_by.meta["val"], old):
        return new
    view, index = _view_of(alias.made_by)
    return _PUT[view.target](_Put(emit, alias.parent.current, old, view, index, new))


def _view_of(made_by: Node) -> tuple[Node, int]:
    """The view call and which of its results this is."""
    if made_by.target is operator.getitem:
        source, index = made_by.args
        assert isinstance(source, Node)
        assert isinstance(index, int)
        return source, index
    return made_by, 0


@dataclass(frozen=True, eq=False)
class _Put:
    emit: Emit
    base: Node
    """The parent in the new program."""
    old: torch.Tensor
    """The parent's value in the old program: its shape."""
    view: Node
    index: int
    new: Node

    def argument(self, name: str) -> Any:
        schema = schema_of(self.view.target)
        for i, argument in enumerate(schema.arguments):
            if argument.name == name:
                given = self.view.args[i] if i < len(self.view.args) else None
                if i >= len(self.view.args):
                    given = self.view.kwargs.get(name, argument.default_value)
                return given
        raise AssertionError(f"{self.view.target} has no argument {name}")

    @property
    def dim(self) -> int:
        return int(self.argument("dim")) % max(self.old.dim(), 1)

    @property
    def parts(self) -> Sequence[torch.Tensor]:
        values: Sequence[torch.Tensor] = self.view.meta["val"]
        return values


def _reshaped(p: _Put) -> Node:
    return p.emit(aten.reshape.default, p.new, list(p.old.shape))


def _reordered(p: _Put) -> Node:
    """The permutation that a call makes, read off by calling it on distinct sizes."""
    sizes = list(range(2, 2 + p.old.dim()))
    tagged = torch.empty(sizes, device="meta")
    rest = [a if not isinstance(a, Node) else tagged for a in p.view.args]
    order = [s - 2 for s in p.view.target(*rest, **p.view.kwargs).shape]  # type: ignore[operator]
    inverse = [order.index(d) for d in range(len(order))]
    return p.emit(aten.permute.default, p.new, inverse)


def _sliced(p: _Put) -> Node:
    size = p.old.shape[p.dim]
    start, end, _ = slice(p.argument("start"), p.argument("end")).indices(size)
    return _scattered(p, start, max(start, end), int(p.argument("step")))


def _narrowed(p: _Put) -> Node:
    size = p.old.shape[p.dim]
    start = int(p.argument("start")) % max(size, 1)
    return _scattered(p, start, start + int(p.argument("length")), 1)


def _part(p: _Put) -> Node:
    start = sum(part.shape[p.dim] for part in p.parts[: p.index])
    return _scattered(p, start, start + p.parts[p.index].shape[p.dim], 1)


def _scattered(p: _Put, start: int, end: int, step: int) -> Node:
    if start == 0 and end >= p.old.shape[p.dim] and step == 1:
        return p.new
    return p.emit(aten.slice_scatter.default, p.base, p.new, p.dim, start, end, step)


def _selected(p: _Put) -> Node:
    return _placed(p, int(p.argument("index")))


def _unbound(p: _Put) -> Node:
    return _placed(p, p.index)


def _placed(p: _Put, index: int) -> Node:
    """Pointwise along the axis, so that a part of it can be done alone."""
    size, dim = p.old.shape[p.dim], p.dim
    row = p.emit(aten.unsqueeze.default, p.new, dim)
    positions = p.emit(aten.arange.default, size, device=p.old.device)
    here = p.emit(aten.eq.Scalar, positions, index % size)
    after = p.old.dim() - 1 - dim
    if after:
        here = p.emit(aten.reshape.default, here, [size] + [1] * after)
    return p.emit(aten.where.self, here, row, p.base)


def _diagonal(p: _Put) -> Node:
    where = [p.argument(name) for name in ("offset", "dim1", "dim2")]
    return p.emit(aten.diagonal_scatter.default, p.base, p.new, *where)


def _all(function: Callable[[_Put], Node], *ops: object) -> dict[object, Callable[[_Put], Node]]:
    return dict.fromkeys(ops, function)


_PUT: Mapping[object, Callable[[_Put], Node]] = {
    **_all(
        _reshaped, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
        aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
        aten.ravel.default, aten.atleast_1d.default, aten.atleast_2d.default,
    ),
    **_all(
        _reordered, aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default,
        aten.numpy_T.default, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int,
        aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist,
    ),
    aten.slice.Tensor: _sliced,
    aten.narrow.default: _narrowed,
    **_all(
        _part, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes,
        aten.chunk.default, aten.tensor_split.sections, aten.tensor_split.indices,
    ),
    aten.select.int: _selected,
    aten.unbind.int: _unbound,
    aten.diagonal.default: _diagonal,
}  # fmt: skip
