"""Weights combined before they meet the values: (P1 - c P2) V as P1 V - c (P2 V).

A product is linear in its weights, so sums, differences and factors that no key has move past it,
and so does the choice of one of several stacked maps: ``P[:, :, 0] @ V`` is ``(P @ V[:, :, None])``
at 0. What is left between a softmax and its values is what detection reads. Differential
transformers (Ye et al., 2024) subtract one softmax from another; a gate may scale each head's map.
"""

from __future__ import annotations

import functools
import operator
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ringfx.passes.axes.call import Call
from ringfx.passes.detect.inline_kernel_calls import inline
from ringfx.passes.detect.names import VIEWS
from ringfx.passes.detect.products import Product, as_product
from ringfx.passes.detect.softmax import CASTS

__all__ = ["distribute"]

aten = torch.ops.aten
_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_SUMS: Mapping[object, Callable[[Any, Any], Tensor]] = {
    aten.add.Tensor: operator.add, aten.sub.Tensor: operator.sub,
}  # fmt: skip
_FACTORS: Mapping[object, Callable[[Tensor, Any], Tensor]] = {
    aten.mul.Tensor: operator.mul, aten.mul.Scalar: operator.mul,
    aten.div.Tensor: operator.truediv, aten.div.Scalar: operator.truediv,
}  # fmt: skip
_PARTS = frozenset({
    aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.tensor_split.sections,
})  # fmt: skip
_MATMULS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})


def distribute(graph: Graph) -> None:
    """Rewrite every product whose weights are a combination of softmaxes.

    The program computes the same, up to rounding.
    """
    for node in list(graph.nodes):
        product = as_product(node)
        if product is None or product.added is not None or product.inner is not None:
            continue
        for side in (0, 1):
            multiplied = _Multiplied(product, side)
            combined = multiplied.read(product.factors[side])
            if combined is not None and not isinstance(combined, _Map):
                given = {n.name: n for n in (*_operands(combined), multiplied.values)}
                spelled = functools.partial(multiplied.spelled, combined)
                node.replace_all_uses_with(inline(node, spelled, named=False, **given))
                _erase(graph, node)
                break


def _erase(graph: Graph, node: Node) -> None:
    """The call and what only it used: what is dead would count as another use of the weights."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for n in inputs:
        if not n.users and n.op == "call_function":
            _erase(graph, n)


# --- what weights are made of ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class _Map:
    """One softmax, cast and viewed."""

    node: Node
    calls: tuple[Node, ...]
    """Casts and views between it and the product that were met on the way to it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Chosen:
    """One of several maps that are stacked along a dimension."""

    stack: Node
    dim: int
    index: int
    cut: tuple[int, tuple[int, int]] | None = None
    """A dimension of ``stack``, and the sizes that it is cut into before."""
    calls: tuple[Node, ...] = ()

    def stacked(self, stack: Tensor) -> Tensor:
        return _applied(self.calls, stack if self.cut is None else stack.unflatten(*self.cut))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Sum:
    call: Node
    terms: tuple[_Combined, _Combined]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scaled:
    call: Node
    of: _Combined
    factor: Any


_Combined: TypeAlias = _Map | _Chosen | _Sum | _Scaled


def _operands(combined: _Combined) -> Iterator[Node]:
    if isinstance(combined, _Map):
        yield combined.node
    elif isinstance(combined, _Chosen):
        yield combined.stack
    elif isinstance(combined, _Sum):
        for term in combined.terms:
            yield from _operands(term)
    else:
        yield from _operands(combined.of)
        if isinstance(combined.factor, Node):
            yield combined.factor


class _Multiplied:
    """A product whose weights are on one side."""

    def __init__(self, product: Product, side: int) -> None:
        self.product = product
        self.side = side
        self.values = product.factors[1 - side]
        self.rank = product.factors[side].meta["val"].dim()
        self._stacks: dict[tuple[Any, ...], Tensor] = {}

    # --- reading ----------------------------------------------------------------------------------

    def read(self, node: Node, calls: tuple[Node, ...] = ()) -> _Combined | None:
        """What the weights are made of; None if not of softmaxes alone, each used once."""
        if len(node.users) != 1:
            return None
        if _is_softmax(node):
            return _Map(node=node, calls=calls)
        inner = _passed(node)
        if inner is not None:
            return self.read(inner, (node, *calls))
        if node.target in _SUMS:
            terms = [self._term(Call(node)[n], node, calls) for n in ("self", "other")]
            return None if None in terms else _Sum(call=node, terms=tuple(terms))  # type: ignore[arg-type]
        if node.target in _FACTORS:
            found = ((self._term(a, node, calls), c) for a, c in _orders(node))
            scaled = (_Scaled(call=node, of=a, factor=c) for a, c in found if a is not None)
            return next((x for x in scaled if self._may_follow(x.factor, calls)), None)
        chosen = _chosen(node, calls)
        return chosen if chosen is not None and self._may_stack(chosen) else None

    def _term(self, value: object, whole: Node, calls: tuple[Node, ...]) -> _Combined | None:
        """An operand that is not broadcast."""
        alike = isinstance(value, Node) and value.meta["val"].shape == whole.meta["val"].shape
        return self.read(value, calls) if alike else None  # type: ignore[arg-type]

    def _may_follow(self, factor: object, calls: tuple[Node, ...]) -> bool:
        """Whether a factor is the same for all that the product sums over."""
        if not isinstance(factor, Node) or factor.meta["val"].numel() == 1:
            return True
        kept = self._kept_dims()
        return not _viewed(calls) and all(
            size == 1 or d in kept for d, size in self._aligned(factor.meta["val"])
        )

    def _may_stack(self, chosen: _Chosen) -> bool:
        if not _only_chosen(chosen.stack) or _viewed(chosen.calls):
            return False
        if self.product.node.target is aten.einsum.default:
            return "." not in Call(self.product.node)["equation"]
        before = chosen.dim < self.rank - 1  # the two dimensions that the product is over
        return (
            self.product.node.target in _MATMULS
            and before
            and self.values.meta["val"].dim() <= self.rank
        )

    def _aligned(self, value: Tensor) -> Iterator[tuple[int, int]]:
        """(dimension of the weights, size) of each dimension of what is broadcast to them."""
        first = self.rank - value.dim()
        return ((first + d, int(size)) for d, size in enumerate(value.shape))

    def _kept_dims(self) -> dict[int, int]:
        """Dimensions of the weights that the result has: there -> here."""
        labels, result = self.product.labels[self.side], self.product.result
        return {d: result.index(dim) for d, dim in enumerate(labels) if dim and dim in result}

    # --- in other words ---------------------------------------------------------------------------

    def spelled(self, combined: _Combined, **given: Tensor) -> Tensor:
        if isinstance(combined, _Map):
            weights = _applied(combined.calls, given[combined.node.name])
            return self._product(weights, given[self.values.name])
        if isinstance(combined, _Chosen):
            return self._one_of(combined, given)
        if isinstance(combined, _Sum):
            a, b = (self.spelled(term, **given) for term in combined.terms)
            alpha = Call(combined.call).get("alpha", 1)
            return _SUMS[combined.call.target](a, b if alpha == 1 else b * alpha)
        factor = combined.factor
        if isinstance(factor, Node):
            factor = self._moved(given[factor.name])
        return _FACTORS[combined.call.target](self.spelled(combined.of, **given), factor)

    def _product(self, weights: Tensor, values: Tensor, equation: str | None = None) -> Tensor:
        pair = (weights, values) if self.side == 0 else (values, weights)
        if self.product.node.target is not aten.einsum.default:
            return torch.matmul(*pair)
        return torch.einsum(equation or Call(self.product.node)["equation"], *pair)

    def _one_of(self, chosen: _Chosen, given: Mapping[str, Tensor]) -> Tensor:
        """All maps of a stack are multiplied at once, and once."""
        key = (chosen.stack, chosen.dim, chosen.cut, chosen.calls)
        by_einsum = self.product.node.target is aten.einsum.default
        if key not in self._stacks:
            stack = chosen.stacked(given[chosen.stack.name])
            values = given[self.values.name]
            at = chosen.dim - (self.rank - values.dim())
            if not by_einsum and at >= 0:
                values = values.unsqueeze(at)
            self._stacks[key] = self._product(stack, values, self._stacked_equation(chosen.dim))
        return self._stacks[key].select(0 if by_einsum else chosen.dim, chosen.index)

    def _stacked_equation(self, dim: int) -> str | None:
        if self.product.node.target is not aten.einsum.default:
            return None
        inputs, out = Call(self.product.node)["equation"].replace(" ", "").split("->")
        terms = inputs.split(",")
        new = next(x for x in string.ascii_letters if x not in inputs)
        terms[self.side] = terms[self.side][:dim] + new + terms[self.side][dim:]
        return f"{','.join(terms)}->{new}{out}"

    def _moved(self, factor: Tensor) -> Tensor:
        """The factor with its dimensions where the result has them."""
        if factor.numel() == 1:
            return factor.reshape(())
        kept = self._kept_dims()
        mine = [(kept[d], size) for d, size in self._aligned(factor) if size != 1]
        order = sorted(range(len(mine)), key=lambda i: mine[i][0])
        shape = [1] * len(self.product.result)
        for d, size in mine:
            shape[d] = size
        return factor.reshape([size for _, size in mine]).permute(order).reshape(shape)


def _is_softmax(node: Node) -> bool:
    """A softmax, seen through casts and views."""
    while node.target in CASTS | VIEWS and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.target in _SOFTMAXES


def _passed(node: Node) -> Node | None:
    """What a cast or a view, or a dropout that drops nothing, is of."""
    if node.target in CASTS | VIEWS and len(node.all_input_nodes) == 1:
        return node.all_input_nodes[0]
    if node.target is aten.dropout.default:
        call = Call(node)
        return call["input"] if not call["train"] or call["p"] == 0 else None  # type: ignore[no-any-return]
    return None


def _applied(calls: tuple[Node, ...], value: Tensor) -> Tensor:
    for node in calls:
        if node.target is not aten.dropout.default:
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator, arg-type]
    return value


def _viewed(calls: tuple[Node, ...]) -> bool:
    return any(node.target in VIEWS for node in calls)


def _orders(node: Node) -> Iterator[tuple[object, Any]]:
    """A map and its factor, either way round; a division has one."""
    a, b = Call(node)["self"], Call(node)["other"]
    yield a, b
    if node.target is aten.mul.Tensor:
        yield b, a


# --- one of several stacked maps ------------------------------------------------------------------


def _chosen(node: Node, calls: tuple[Node, ...]) -> _Chosen | None:
    """Which one of several equal parts the call takes, if it takes one of a stack of softmaxes."""
    read = _CHOICES.get(node.target)
    found = None if read is None else read(node)
    if found is None or not _is_softmax(found.stack):
        return None
    return replace(found, calls=calls)


def _selected(node: Node) -> _Chosen:
    stack, dim, index = (Call(node)[n] for n in ("self", "dim", "index"))
    return _Chosen(stack=stack, dim=dim % stack.meta["val"].dim(), index=index)


def _part(node: Node) -> _Chosen | None:
    source, index = node.args
    if not isinstance(source, Node) or source.target not in _PARTS:
        return None
    stack = Call(source)["self"]
    shape = stack.meta["val"].shape
    dim, count = Call(source)["dim"] % len(shape), len(source.meta["val"])
    if source.target is aten.unbind.int:
        return _Chosen(stack=stack, dim=dim, index=index)  # type: ignore[arg-type]
    if len({v.shape for v in source.meta["val"]}) != 1:
        return None
    cut = (dim, (count, shape[dim] // count))
    return _Chosen(stack=stack, dim=dim, index=index, cut=cut)  # type: ignore[arg-type]


def _sliced(node: Node) -> _Chosen | None:
    """x[:, :n] and x[:, n:], or x[:, ::2] and x[:, 1::2]."""
    call = Call(node)
    stack, step = call["self"], call["step"]
    dim = call["dim"] % stack.meta["val"].dim()
    whole, size = (int(x.meta["val"].shape[dim]) for x in (stack, node))
    start = slice(call["start"], None).indices(whole)[0]
    alone = len(stack.users) == 1  # a sink that is dropped, some of the queries
    if alone or size == 0 or whole % size or whole == size:
        return None
    count = whole // size
    if step == 1 and start % size == 0:
        return _Chosen(stack=stack, dim=dim, index=start // size, cut=(dim, (count, size)))
    if step == count and start < count:
        return _Chosen(stack=stack, dim=dim + 1, index=start, cut=(dim, (size, count)))
    return None


_CHOICES: Mapping[object, Callable[[Node], _Chosen | None]] = {
    aten.select.int: _selected, operator.getitem: _part, aten.slice.Tensor: _sliced,
}  # fmt: skip


def _only_chosen(stack: Node) -> bool:
    """Whether nothing else reads the maps: they would have to exist."""
    return all(user.target in _CHOICES or user.target in _PARTS for user in stack.users)
