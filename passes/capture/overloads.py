"""What an operator that writes in place writes, as the value of a functional operator."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from itertools import takewhile
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch.fx import Node

from ringfx.torch_compat.fake_tensors import FakeTensor, unset_fake_temporarily
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["CLEARER", "Program", "arguments_for", "functional_overload", "written_operands"]

aten = torch.ops.aten


def written_operands(node: Node) -> list[Node]:
    """The operands that a call writes into, in the order of its schema."""
    schema = schema_of(node.target)
    found: list[Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        values = value if isinstance(value, (tuple, list)) else [value]
        found += [v for v in values if isinstance(v, Node)]
    return found


def functional_overload(op: OpOverload) -> OpOverload | None:
    """The operator that returns what this one writes.

    >>> functional_overload(torch.ops.aten.add_.Tensor)
    <OpOverload(op='aten.add', overload='Tensor')>
    >>> functional_overload(torch.ops.aten.bernoulli_.float)
    <OpOverload(op='aten.bernoulli', overload='p')>
    """
    name = schema_of(op).name.split("::")[1]
    if name in _NO_VALUE:
        return None
    in_place = name.endswith("_")
    if name.startswith("__i"):
        name = "__" + name[3:]
    elif in_place:
        name = _RENAMED.get(name, name[:-1])
    packet = getattr(getattr(torch.ops, op.namespace), name, None)
    wanted = [_parameter(a) for a in schema_of(op).arguments if in_place or not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        if keyword.iskeyword(overload):
            continue  # random.from: generated code cannot name it
        found: OpOverload = getattr(packet, overload)
        schema = schema_of(found)
        if [_parameter(a) for a in schema.arguments] == wanted and not schema.is_mutable:
            return found
    return None


_NO_VALUE = frozenset({"set_", "resize_", "resize_as_"})
"""Change what memory a tensor is, not what it holds."""
_RENAMED = {"normal_": "normal_functional"}


def _parameter(argument: Any) -> tuple[str, str]:
    return argument.name, str(argument.type)


def arguments_for(op: OpOverload, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments without those that only say where the result goes.

    A default of the in-place operator need not be one of the functional operator. What has a place
    is given by it: some names (``from``) are keywords of Python, and no code can say them.
    """
    schema = schema_of(node.target)
    given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    for argument in schema.arguments[len(node.args) :]:
        if argument.has_default_value() and not argument.kwarg_only:
            given.setdefault(argument.name, argument.default_value)
    known = [a for a in schema_of(op).arguments if a.name in given]
    placed = takewhile(lambda a: a.name in given and not a.kwarg_only, schema_of(op).arguments)
    args = tuple(given[a.name] for a in placed)
    return args, {a.name: given[a.name] for a in known[len(args) :]}


# --- operators that are clearer in other words ------------------------------------------------


class Program(Protocol):
    """The new program, at the call that is being rewritten."""

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node: ...

    def current(self, value: Any) -> Any: ...


def _copied(f: Program, node: Node) -> Node:
    """x.copy_(y): y in x's shape and type."""
    old = node.args[0].meta["val"]  # type: ignore[union-attr]
    value = f.current(node.args[1])
    if not isinstance(value, Node):
        return f.emit(aten.full_like.default, f.current(node.args[0]), value)
    value = _cast(f, value, old)
    return value if value.meta["val"].shape == old.shape else _expanded(f, value, old)


def _cast(f: Program, value: Node, old: torch.Tensor) -> Node:
    """In the type, and on the device, of what is written."""
    given = value.meta["val"]
    if given.device != old.device:
        return f.emit(aten.to.device, value, old.device, old.dtype)
    return value if given.dtype == old.dtype else f.emit(aten.to.dtype, value, old.dtype)


def _expanded(f: Program, value: Node, old: torch.Tensor) -> Node:
    surplus = value.meta["val"].dim() - old.dim()
    if surplus > 0:  # leading dimensions of size 1
        value = f.emit(aten.reshape.default, value, list(value.meta["val"].shape[surplus:]))
    return f.emit(aten.expand.default, value, list(old.shape))


def _filled(f: Program, node: Node) -> Node:
    old = node.args[0].meta["val"]  # type: ignore[union-attr]
    value = f.current(node.args[1])
    number = _number(value, node.graph.owning_module)
    if number is not None:
        return f.emit(aten.full_like.default, f.current(node.args[0]), number)
    return _expanded(f, _cast(f, value, old), old)


def _number(value: Any, module: torch.nn.Module | None) -> Any:
    """A number as it is, or that of a constant which nothing has written; None if not known.

    ``x[0] = 1.0`` hands over a tensor on the CPU, wherever x is.
    """
    if not isinstance(value, Node):
        return value
    if value.target is aten.lift_fresh_copy.default:
        (value,) = value.args
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    held = attrgetter(str(value.target))(module)
    if not isinstance(held, torch.Tensor) or isinstance(held, FakeTensor) or held.dim():
        return None
    with unset_fake_temporarily():
        return held.item()


def _zeroed(f: Program, node: Node) -> Node:
    return f.emit(aten.full_like.default, f.current(node.args[0]), 0)


def _on_the_diagonal(f: Program, node: Node) -> Node | None:
    """x.fill_diagonal_(number) of a matrix: a choice by row and column."""
    old, wraps = node.args[0].meta["val"], node.args[2:] or node.kwargs  # type: ignore[union-attr]
    if old.dim() != 2 or wraps:
        return None
    here = f.emit(aten.eye.m, *old.shape, dtype=torch.bool, device=old.device)
    return f.emit(aten.masked_fill.Scalar, f.current(node.args[0]), here, node.args[1])


def _chosen(f: Program, node: Node) -> Node | None:
    """x[mask] = value, alike for all that the mask picks, as a choice between two values."""
    base, indices, value, *accumulate = node.args
    places = [i for i in indices if i is not None]  # type: ignore[union-attr]
    given = value.meta["val"]  # type: ignore[union-attr]
    if any(accumulate) or node.kwargs or len(places) != 1:
        return None
    mask = places[0]
    assert isinstance(mask, Node)
    if mask.meta["val"].dtype != torch.bool:
        return None
    rank, before = base.meta["val"].dim(), list(indices).index(mask)  # type: ignore[union-attr, arg-type]
    shape = mask.meta["val"].shape
    after = rank - before - len(shape)
    sizes = list(given.shape[1:] if given.shape[:-after] == (1,) else given.shape)
    if given.numel() == 1:
        sizes = []
    elif len(sizes) > after:  # a value for each that it picks
        return None
    here = f.current(mask)
    if before or after:
        here = f.emit(aten.reshape.default, here, [1] * before + list(shape) + [1] * after)
    new = f.current(value)
    if sizes != list(given.shape):
        new = f.emit(aten.reshape.default, new, sizes)
    return f.emit(aten.where.self, here, new, f.current(base))


def _dropped(op: OpOverload) -> Callable[[Program, Node], Node]:
    """Functional dropouts call ``input`` what those in place call ``self``."""
    return lambda f, node: f.emit(op, f.current(node.args[0]), *node.args[1:], **node.kwargs)


CLEARER: Mapping[object, Callable[[Program, Node], Node | None]] = {
    aten.copy_.default: _copied,
    aten.fill_.Scalar: _filled,
    aten.fill_.Tensor: _filled,
    aten.zero_.default: _zeroed,
    aten.index_put_.default: _chosen,
    aten.fill_diagonal_.default: _on_the_diagonal,
    aten.dropout_.default: _dropped(aten.dropout.default),
    aten.feature_dropout_.default: _dropped(aten.feature_dropout.default),
    aten.alpha_dropout_.default: _dropped(aten.alpha_dropout.default),
    aten.feature_alpha_dropout_.default: _dropped(aten.feature_alpha_dropout.default),
}
"""Call -> its new value, or None where the functional overload will do."""
