"""Attention weights of which some become 0 at random: dropout, as a function or spelled out.

Spelled out, weights are multiplied with random numbers of two values, one of them 0, or filled with
0 where a random truth value says so. The numbers come from a Bernoulli draw or from uniform numbers
that are compared with one, and pass through casts and factors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from ringfx.passes.axes.call import Call
from ringfx.passes.detect.softmax import CASTS
from ringfx.torch_compat.graphs import position_key

__all__ = ["Drop", "dropped", "scaled"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, kw_only=True)
class Drop:
    """A step at which weights are kept with a chance, and multiplied."""

    weights: Node
    """What is dropped from."""
    calls: tuple[Node, ...]
    """In program order; the last gives the weights that are left."""
    keeps: float
    factor: float
    drawn: frozenset[Node] = frozenset()
    """Those of the calls that make the random numbers."""

    @property
    def result(self) -> Node:
        return self.calls[-1]


def dropped(weights: Node, users: Sequence[Node]) -> Drop | str | None:
    """The step that the users of some weights are together; why it is none; or None.

    A factor alone is no step: it is one only after weights were dropped (``scaled``).
    """
    if not users:
        return None
    *others, last = sorted(users, key=position_key)
    if last.target is aten.dropout.default and not others:
        call = Call(last)
        p = float(call["p"]) if call["train"] else 0.0
        return Drop(weights=weights, calls=(last,), keeps=1 - p, factor=_scale(p))
    if last.target is aten.native_dropout.default and not others:
        return _native(last, weights)
    read = _MEETS.get(last.target)
    mask = None if read is None else read(last, weights)
    if mask is None:
        return None
    if mask.shape != tuple(weights.meta["val"].shape):
        return "its weights are dropped by one random number for several of them"
    if any(n not in mask.calls for n in others) or not mask.is_read_by(last):
        return "what its weights are dropped by has other users"
    calls = (*sorted(mask.calls, key=position_key), last)
    return Drop(weights=weights, calls=calls, keeps=mask.chance, factor=mask.high, drawn=mask.calls)


def scaled(weights: Node, users: Sequence[Node]) -> Drop | None:
    """Weights times a number."""
    if len(users) != 1:
        return None
    (user,) = users
    factor = _number(user, weights)
    if factor is None:
        return None
    return Drop(weights=weights, calls=(user,), keeps=1.0, factor=factor)


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _native(node: Node, weights: Node) -> Drop | str:
    call = Call(node)
    p = float(call["p"]) if call["train"] in (None, True) else 0.0
    kept = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    if len(kept) != 1 or any(u.users for u in node.users if u not in kept):
        return "what its weights are dropped by has other users"
    (last,) = kept
    unread = [u for u in node.users if u is not last]
    return Drop(
        weights=weights, calls=(node, *unread, last), keeps=1 - p, factor=_scale(p),
        drawn=frozenset({node, *unread}),
    )  # fmt: skip


# --- random numbers of two values -----------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class _Mask:
    """Random numbers: ``high`` with a chance, else ``low``; or truth values, 1 and 0."""

    chance: float
    shape: tuple[int, ...]
    calls: frozenset[Node]
    low: float = 0.0
    high: float = 1.0

    def is_read_by(self, last: Node) -> bool:
        """And by nothing else."""
        return all(u is last or u in self.calls for n in self.calls for u in n.users)

    def over(self, node: Node, change: Callable[[float], float]) -> _Mask:
        low, high = change(self.low), change(self.high)
        return replace(self, low=low, high=high, calls=self.calls | {node})

    @property
    def dropping(self) -> _Mask | None:
        """With the value that is not 0 as the high one; None if neither is 0."""
        if self.low == 0:
            return self
        if self.high != 0:
            return None
        return replace(self, chance=1 - self.chance, low=0.0, high=self.low)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Uniform:
    """Numbers between ``start`` and ``start + 1``, all alike."""

    shape: tuple[int, ...]
    calls: frozenset[Node]
    start: float = 0.0


_Random: TypeAlias = _Mask | _Uniform


def _random(value: object) -> _Random | None:
    """What a value draws, if it is a function of one draw."""
    if not isinstance(value, Node) or value.op != "call_function":
        return None
    made = _DRAWS.get(value.target)
    if made is not None:
        return made(value)
    change = _CHANGES.get(value.target)
    source = value.args[0] if value.args else None
    found = _random(source) if change is not None else None
    return None if found is None or change is None else change(value, found)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _with_likes(node: Node) -> frozenset[Node]:
    """A draw, and calls that only make room for it."""
    found, todo = {node}, list(node.all_input_nodes)
    while todo:
        like = todo.pop()
        if like.target in _ROOMS and all(u in found for u in like.users):
            found.add(like)
            todo += like.all_input_nodes
    return frozenset(found)


def _uniform(node: Node) -> _Random | None:
    ends = [Call(node).get(n, d) for n, d in (("from", 0), ("to", 1))]
    if node.target is aten.uniform.default and ends != [0, 1]:
        return None
    return _Uniform(shape=_shape(node), calls=_with_likes(node))


def _bernoulli(node: Node) -> _Random | None:
    p: Any = Call(node)["p"]
    if not isinstance(p, (int, float)):
        return None
    return _Mask(chance=float(p), shape=_shape(node), calls=_with_likes(node))


def _bernoulli_of(node: Node) -> _Random | None:
    """Of a tensor that is one number everywhere."""
    chances = Call(node).operands[0]
    p: Any = Call(chances)["fill_value"] if chances.target in _FILLED else None
    if not isinstance(p, (int, float)):
        return None
    return _Mask(chance=float(p), shape=_shape(node), calls=_with_likes(node))


_ROOMS = frozenset({
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.full.default, aten.empty.memory_format, aten.zeros.default,
    aten.ones.default, aten.new_full.default, aten.new_empty.default, aten.new_zeros.default,
    aten.new_ones.default, aten.detach.default, aten.clone.default,
})  # fmt: skip
_FILLED = (aten.full.default, aten.full_like.default, aten.new_full.default)
_DRAWS: Mapping[object, Callable[[Node], _Random | None]] = {
    aten.rand.default: _uniform, aten.rand_like.default: _uniform, aten.uniform.default: _uniform,
    aten.bernoulli.p: _bernoulli, aten.bernoulli.default: _bernoulli_of,
}  # fmt: skip


def _compared(above: bool) -> Callable[[Node, _Random], _Random | None]:
    """Uniform numbers with a number: true with the chance that they lie on one side of it."""

    def read(node: Node, found: _Random) -> _Random | None:
        bound = node.args[1]
        if not isinstance(bound, (int, float)):
            return None
        if isinstance(found, _Mask):
            return found.over(node, lambda x: float(x > bound if above else x < bound))
        below = min(max(bound - found.start, 0.0), 1.0)
        chance = 1 - below if above else below
        return _Mask(chance=chance, shape=found.shape, calls=found.calls | {node})

    return read


def _changed(change: Callable[[float, float], float]) -> Callable[[Node, _Random], _Random | None]:
    """A factor or a term of numbers of two values."""

    def read(node: Node, found: _Random) -> _Random | None:
        number = Call(node).get("other", 0)
        if not isinstance(number, (int, float)) or Call(node).get("alpha", 1) != 1:
            return None
        if isinstance(found, _Uniform):
            adds = node.target is aten.add.Tensor
            calls = found.calls | {node}
            return replace(found, start=found.start + number, calls=calls) if adds else None
        if node.target is aten.div.Tensor and number == 0:
            return None
        return found.over(node, lambda x: change(x, float(number)))

    return read


def _same(node: Node, found: _Random) -> _Random | None:
    """A cast, of uniform numbers no rounding to integers."""
    if isinstance(found, _Uniform):
        kept = node.meta["val"].is_floating_point()
        return replace(found, calls=found.calls | {node}) if kept else None
    return found.over(node, lambda x: float(bool(x)) if node.meta["val"].dtype == torch.bool else x)


def _inverted(node: Node, found: _Random) -> _Random | None:
    if isinstance(found, _Uniform) or node.meta["val"].dtype != torch.bool:
        return None
    return found.over(node, lambda x: float(not x))


def _floored(node: Node, found: _Random) -> _Random | None:
    """floor(keep + uniform): 1 with the chance ``keep``."""
    if not isinstance(found, _Uniform) or not 0 <= found.start <= 1:
        return None
    return _Mask(chance=found.start, shape=found.shape, calls=found.calls | {node})


_CHANGES: Mapping[object, Callable[[Node, _Random], _Random | None]] = {
    aten.gt.Scalar: _compared(above=True), aten.ge.Scalar: _compared(above=True),
    aten.lt.Scalar: _compared(above=False), aten.le.Scalar: _compared(above=False),
    aten.mul.Tensor: _changed(lambda x, n: x * n), aten.div.Tensor: _changed(lambda x, n: x / n),
    aten.add.Tensor: _changed(lambda x, n: x + n), aten.rsub.Scalar: _changed(lambda x, n: n - x),
    aten.logical_not.default: _inverted, aten.bitwise_not.default: _inverted,
    aten.floor.default: _floored, **dict.fromkeys(CASTS, _same),
}  # fmt: skip


# --- where weights meet them ----------------------------------------------------------------------


def _times(node: Node, weights: Node) -> _Mask | None:
    others = [x for x in node.args if x is not weights]
    found = _random(others[0]) if len(others) == 1 else None
    return found.dropping if isinstance(found, _Mask) else None


def _filled(node: Node, weights: Node) -> _Mask | None:
    """``masked_fill(weights, mask, 0)`` and ``where(mask, weights, 0)``."""
    if node.target is aten.masked_fill.Scalar:
        value, test, other, keeps = node.args[0], node.args[1], node.args[2], False
    elif node.args[1] is weights:
        test, value, other, keeps = (*node.args[:3], True)
    else:
        test, other, value, keeps = (*node.args[:3], False)
    found = _random(test)
    if value is not weights or not isinstance(found, _Mask) or not _is_zero(other):
        return None
    chance = found.chance if (found.high > 0) == keeps else 1 - found.chance
    if (found.low > 0) == (found.high > 0):
        return None
    zero = {other} if isinstance(other, Node) else set[Node]()
    return replace(found, chance=chance, low=0.0, high=1.0, calls=found.calls | zero)


def _is_zero(value: object) -> bool:
    if isinstance(value, Node):
        return value.target in (aten.zeros_like.default, aten.zeros.default) or (
            value.target is aten.scalar_tensor.default and bool(value.args[0] == 0)
        )
    return isinstance(value, (int, float)) and value == 0


_MEETS: Mapping[object, Callable[[Node, Node], _Mask | None]] = {
    aten.mul.Tensor: _times, aten.masked_fill.Scalar: _filled, aten.where.self: _filled,
    aten.where.ScalarOther: _filled, aten.where.ScalarSelf: _filled,
}  # fmt: skip


def _number(user: Node, weights: Node) -> float | None:
    """The number that weights are multiplied with."""
    if user.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return None
    number = user.args[1] if user.args[0] is weights else user.args[0]
    if not isinstance(number, (int, float)) or number == 0:
        return None
    divides = user.target in (aten.div.Tensor, aten.div.Scalar)
    return 1 / float(number) if divides else float(number)
