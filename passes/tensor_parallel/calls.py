"""What a call on DTensors is on this rank's parts.

Dynamo's graph states of each value how it is placed. Where a module's hook places a value anew
(``from_local``, ``redistribute``, ``to_local``), the program has the conversion, with its transpose
as backward. Any other call runs on the parts if the axis table says that the result is then placed
as torch states it: all operands that have the sharded label are sharded along it, and what is
summed along it is partial. An operand without that label is used by each rank for its part, so its
gradient is summed over the ranks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn import functional as F

from ringfx.errors import CaptureRefused
from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, AxisSharing, Call, OpAxes, result_values
from ringfx.passes.capture import parallel_calls as message
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.placed import PlacedValue
from ringfx.torch_compat.distributed import Placed, UnknownPlacement, placed
from ringfx.torch_compat.pytree import tree_flatten, tree_unflatten

__all__ = ["PlacedCalls"]

aten = torch.ops.aten
Tensor = torch.Tensor

_ADDED = {aten.linear.default: "bias", aten.addmm.default: "self", aten.baddbmm.default: "self"}
"""The argument of a product that is added to it: once, where the product is partial."""
_PRODUCTS = {
    *_ADDED, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default,
    aten.einsum.default, aten.sum.dim_IntList,
}  # fmt: skip
"""Calls that are linear in what they sum."""
_ADVICE = (
    "Do: let the module give plain tensors (use_local_output=True, output_layouts=Replicate()), "
    "or leave it out of the parallelize plan."
)


@dataclass(frozen=True)
class _Uses:
    """What happens to one operand before the call."""

    enters: bool = False
    """Its gradient is summed over the ranks."""
    on_first: bool = False
    """Only the first rank adds it."""


class PlacedCalls:
    """Calls that take or make a DTensor, on parts.

    Parameters
    ----------
    known
        The axis table: the rule for an operator, or None.
    """

    def __init__(self, known: Callable[[object], AxisRule | None]) -> None:
        self._known = known

    def __call__(
        self, node: torch.fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result: a ``PlacedValue``, several, or a plain tensor.

        Raises
        ------
        CaptureRefused
            There is no such call on parts; it names the call and the placements.
        """
        where = describe_node(node)
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        name = name.removeprefix("prim_")
        try:
            if target is operator.getitem and not isinstance(args[0], PlacedValue):
                return args[0][args[1]]
            if name == "from_local":
                return self._from_local(node, where, args, kwargs)
            if name == "redistribute":
                return converted(args[0], _stated(node, where), where)
            if name in ("to_local", "full_tensor"):
                whole = name == "full_tensor"
                return _to_local(args[0], kwargs.get("grad_placements"), where, whole=whole)
            return self._on_parts(node, target, args, kwargs, where)
        except UnknownPlacement as unknown:
            raise CaptureRefused(
                f"{where}: a DTensor of the program is placed as {unknown}, but ringfx knows "
                f"Replicate(), Shard(dim) and Partial(sum) over one mesh dimension. {_ADVICE}"
            ) from unknown

    def _from_local(
        self, node: torch.fx.Node, where: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> PlacedValue:
        wanted = kwargs.get("grad_placements")
        if wanted is not None:
            raise CaptureRefused(
                f"{where}: DTensor.from_local is given grad_placements={wanted}, for which ringfx "
                "has no rule. Do: leave grad_placements out."
            )
        stated = _stated(node, where)
        local: Tensor = args[0]
        _refuse_uneven(tuple(local.shape), stated, where)
        return PlacedValue(local, stated)

    def _on_parts(
        self,
        node: torch.fx.Node,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        where: str,
    ) -> Any:
        def run(flat: Sequence[Any]) -> Any:
            given, named = tree_unflatten(list(flat), structure)
            return (
                getattr(given[0], target)(*given[1:], **named)
                if isinstance(target, str)
                else target(*given, **named)
            )

        flat, structure = tree_flatten((args, kwargs))
        values = [x for x in flat if isinstance(x, PlacedValue)]
        first = values[0].placed
        if any(x.placed.group != first.group for x in values):
            raise CaptureRefused(
                f"{where}: it takes DTensors over different groups of ranks. {_ADVICE}"
            )
        traced = _traced(run, flat)
        stated = [_stated(None, where, value) for value in _flat(node.meta.get("example_value"))]
        rows = _rows(traced, values)
        if rows is not None:
            return _embedded(rows, values, flat, stated[0], where)
        found = self._placements(traced, values, where)
        for value, other in zip(found.results, stated, strict=True):
            if replace(value, shape=()) != replace(other, shape=()):
                raise CaptureRefused(
                    f"{where}: its parts make a result placed as {value}, but torch states "
                    f"{other}: it would place operands anew by itself. {_ADVICE}"
                )
        uses = iter(found.uses)
        locals_ = [_used(x, next(uses), where) if isinstance(x, PlacedValue) else x for x in flat]
        if found.is_view:
            shape = _local_shape(found.results[0])
            return PlacedValue(locals_[0].reshape(shape), stated[0])
        results = run(locals_)
        given, structure_ = tree_flatten(results)
        made = [PlacedValue(x, s) for x, s in zip(given, stated, strict=True)]
        return tree_unflatten(made, structure_)

    def _placements(
        self, traced: torch.fx.Graph, values: Sequence[PlacedValue], where: str
    ) -> _Found:
        """Of the results, label by label."""
        known: dict[torch.fx.Node, list[Placed]] = {}
        inputs = traced.find_nodes(op="placeholder")
        for node, value in zip(inputs, values, strict=True):
            known[node] = [value.placed]
        uses: dict[torch.fx.Node, set[_Uses]] = {node: set() for node in inputs}
        calls = [n for n in traced.nodes if n.op == "call_function"]
        is_view = False
        for node in calls:
            if not result_values(node):
                raise CaptureRefused(f"{where}: {node.target} reads a DTensor's values. {_ADVICE}")
            rule = self._known(node.target)
            if rule is None:
                raise CaptureRefused(
                    f"{where}: ringfx has no axis rule for {node.target}, which takes a DTensor. "
                    f"{_ADVICE}"
                )
            call = Call(node)
            operands = [known[n][0] if n in known else None for n in call.operands]
            axes = rule(call)
            if isinstance(axes.how, how.Reshape):
                known[node] = [_reshaped(call, operands[0], values[0].placed, where)]
                is_view = known[node][0].dim is not None
                if is_view and len(calls) > 1:
                    raise CaptureRefused(
                        f"{where}: a reshape of a DTensor within another call. {_ADVICE}"
                    )
                continue
            known[node] = _results(call, axes, operands, values[0].placed, uses, where)
        for node, found in uses.items():
            if len(found) > 1 and node in uses:
                raise CaptureRefused(
                    f"{where}: it uses the operand {node.name} for a part and for the whole. "
                    f"{_ADVICE}"
                )
        output: Any = traced.output_node().args[0]
        results = [known[n][0] for n in _flat(output)]
        return _Found(
            results=results,
            uses=[next(iter(uses[n])) if uses[n] else _Uses() for n in inputs],
            is_view=is_view,
        )


@dataclass(frozen=True)
class _Found:
    results: list[Placed]
    uses: list[_Uses]
    is_view: bool
    """It is a reshape whose sizes are those of the whole."""


def _flat(value: Any) -> list[Any]:
    leaves: list[Any] = tree_flatten(value)[0]
    return leaves


def _stated(node: torch.fx.Node | None, where: str, value: Any = None) -> Placed:
    """How torch says that a result is placed."""
    found = placed(value if node is None else node.meta.get("example_value"))
    if found is None:
        raise CaptureRefused(
            f"{where}: it takes a DTensor and gives a plain value. Do: call to_local() or "
            "full_tensor() first."
        )
    return found


def _refuse_uneven(local: Sequence[int], stated: Placed, where: str) -> None:
    if stated.dim is None:
        return
    part, whole = local[stated.dim], stated.shape[stated.dim]
    if part * stated.ranks != whole:
        raise CaptureRefused(
            f"{where}: dimension {stated.dim} of {stated.shape} is spread over {stated.ranks} "
            f"ranks, of which this one has {part} of {whole}: parts must be equal. Do: choose a "
            f"size that {stated.ranks} divides, or leave this module out of the parallelize plan."
        )


def converted(value: PlacedValue, to: Placed, where: str) -> PlacedValue:
    """``redistribute``: the message that places a value anew."""
    at = value.placed
    x, ranks, group = value.local, at.ranks, at.group
    if (at.dim, at.partial) == (to.dim, to.partial):
        return value
    if at.dim is not None and not to.partial and to.dim is not None:
        whole = converted(value, replace(at, dim=None), where)
        return converted(whole, to, where)
    if at.partial:
        x = (
            message.SUM(x, group, where)
            if to.dim is None
            else message.SUM_TO_PART(x, ranks, group, to.dim, where)
        )
    elif at.dim is not None and not to.partial:
        x = message.GATHER(x, ranks, group, at.dim, where)
    elif to.partial and at.dim is None:
        x = message.ON_FIRST(x, ranks, group)
    elif to.dim is not None:
        _refuse_uneven(_local_shape(to, where), to, where)
        x = message.OWN_PART(x, ranks, group, to.dim, where)
    else:
        raise CaptureRefused(f"{where}: a DTensor is redistributed from {at} to {to}. {_ADVICE}")
    return PlacedValue(x, to)


def _to_local(value: PlacedValue, gradient: Any, where: str, *, whole: bool) -> Tensor:
    if whole:
        at = value.placed
        return converted(value, replace(at, dim=None, partial=False), where).local
    if gradient is None:
        return value.local
    (wanted,) = gradient
    if wanted.is_partial() and value.placed.dim is None:
        entered: Tensor = message.ENTER(value.local, value.placed.group, where)
        return entered
    same = wanted.is_replicate() if value.placed.dim is None else wanted.is_shard(value.placed.dim)
    if not same:
        raise CaptureRefused(
            f"{where}: to_local() of a DTensor placed as {value.placed} is given "
            f"grad_placements={wanted}, for which ringfx has no rule. Do: leave grad_placements "
            "out."
        )
    return value.local


def _local_shape(of: Placed, where: str = "") -> list[int]:
    shape = list(of.shape)
    if of.dim is not None:
        if shape[of.dim] % of.ranks:
            _refuse_uneven([s // of.ranks for s in shape], of, where)
        shape[of.dim] //= of.ranks
    return shape


def _traced(run: Callable[[Sequence[Any]], Any], flat: Sequence[Any]) -> torch.fx.Graph:
    """The call as operators on whole values, unrecorded; its inputs are the placed operands."""
    places = [i for i, x in enumerate(flat) if isinstance(x, PlacedValue)]
    with disable_proxy_modes_tracing():
        wholes = [flat[i].local.detach().new_empty(flat[i].placed.shape) for i in places]

        def on(*given: Tensor) -> Any:
            filled = list(flat)
            for i, x in zip(places, given, strict=True):
                filled[i] = x
            return run(filled)

        return make_fx(on, pre_dispatch=True)(*wholes).graph


def _used(value: PlacedValue, use: _Uses, where: str) -> Tensor:
    x, at = value.local, value.placed
    if use.on_first:
        x = message.ON_FIRST(x, at.ranks, at.group)
    elif use.enters and (x.is_floating_point() or x.is_complex()):
        x = message.ENTER(x, at.group, where)
    return x


def _results(
    call: Call,
    axes: OpAxes,
    operands: Sequence[Placed | None],
    over: Placed,
    uses: dict[torch.fx.Node, set[_Uses]],
    where: str,
) -> list[Placed]:
    """Placements of a call's results; how it uses its operands is noted."""
    sharded: set[str] = set()
    for operand, labels in zip(operands, axes.operands, strict=True):
        if operand is None or (operand.dim is None and not operand.partial):
            continue
        names = () if labels is None or operand.dim is None else labels[operand.dim]
        if operand.partial or len(names) != 1:
            raise CaptureRefused(
                f"{where}: {call.name} takes a DTensor placed as {operand}. {_ADVICE}"
            )
        sharded.add(names[0])
    whole = [replace(over, shape=tuple(s), dim=None, partial=False) for s in call.result_shapes]
    if not sharded:
        for node in call.operands:
            uses.get(node, set()).add(_Uses())
        return whole
    label = sharded.pop()
    share = axes.share_of(label)
    stays = any(label in names for dims in axes.results for names in dims)
    summed = share is AxisSharing.PARTIAL_SUM or (call.node.target in _ADDED and not stays)
    refused = (
        sharded
        or (share is AxisSharing.NEEDS_ALL and not summed)
        or (summed and call.node.target not in _PRODUCTS)
        or isinstance(axes.how, how.Draw)
        or any(label in (w.source, w.result) for w in axes.windows)
    )
    if refused:
        raise CaptureRefused(
            f"{where}: {call.name} needs all of a dimension of which each rank of tensor "
            f"parallelism has a part{f' ({axes.reason})' if axes.reason else ''}. {_ADVICE}"
        )
    added = next((name for op, name in _ADDED.items() if summed and op is call.node.target), None)
    for i, (node, operand) in enumerate(zip(call.operands, operands, strict=True)):
        dims = axes.operands[i] or ()
        has = any(label in names for names in dims)
        is_sharded = operand is not None and operand.dim is not None
        if has != is_sharded:
            raise CaptureRefused(
                f"{where}: {call.name} takes one DTensor that is sharded and another that has all "
                f"of the same dimension. {_ADVICE}"
            )
        use = _Uses()
        if not has:
            is_added = added is not None and call.get(added) is node
            use = _Uses(on_first=is_added, enters=not is_added)
        if node in uses:
            uses[node].add(use)
        elif operand is not None and use != _Uses():
            raise CaptureRefused(
                f"{where}: {call.name} uses {node.name}, which the same call made, for a part. "
                f"{_ADVICE}"
            )
    return [
        replace(x, dim=_at(labels, label), partial=summed)
        for x, labels in zip(whole, axes.results, strict=True)
    ]


def _at(labels: Sequence[Sequence[str]], label: str) -> int | None:
    return next((d for d, names in enumerate(labels) if tuple(names) == (label,)), None)


def _reshaped(call: Call, operand: Placed | None, over: Placed, where: str) -> Placed:
    """A row-major reshape keeps parts together where as much lies before the sharded dimension."""
    shape = tuple(call.result_shape)
    made = replace(over, shape=shape, dim=None, partial=False)
    if operand is None or operand.dim is None:
        return made
    before = math.prod(operand.shape[: operand.dim])
    for dim, size in enumerate(shape):
        if math.prod(shape[:dim]) == before and size % over.ranks == 0:
            return replace(made, dim=dim)
    raise CaptureRefused(
        f"{where}: a reshape from {operand.shape} to {shape} cuts through the parts of dimension "
        f"{operand.dim} on {over.ranks} ranks. {_ADVICE}"
    )


@dataclass(frozen=True)
class _Rows:
    """An embedding whose table's rows are spread."""

    weight: int
    numbers: int
    """Places of both among the placed operands."""
    padding: int


def _rows(traced: torch.fx.Graph, values: Sequence[PlacedValue]) -> _Rows | None:
    calls = [n for n in traced.nodes if n.op == "call_function"]
    if len(calls) != 1 or calls[0].target is not aten.embedding.default:
        return None
    call = Call(calls[0])
    inputs = traced.find_nodes(op="placeholder")
    weight, numbers = inputs.index(call["weight"]), inputs.index(call["indices"])
    if values[weight].placed.dim != 0:
        return None
    return _Rows(weight, numbers, int(call["padding_idx"]))


def _embedded(
    rows: _Rows, values: Sequence[PlacedValue], flat: Sequence[Any], stated: Placed, where: str
) -> PlacedValue:
    """Each rank looks up what lies in its rows; the sum over ranks is the embedding."""
    weight, numbers = values[rows.weight], values[rows.numbers]
    at, local = weight.placed, weight.local
    if not stated.partial or numbers.placed.dim is not None or numbers.placed.partial:
        raise CaptureRefused(
            f"{where}: an embedding whose rows are spread takes numbers placed as "
            f"{numbers.placed} and gives {stated}. {_ADVICE}"
        )
    own = message.OWN_ROWS(numbers.local, local.shape[0], at.ranks, at.group)
    found = F.embedding(own.clamp_min(0), local)
    if rows.padding >= 0:
        is_padding = (numbers.local == rows.padding).unsqueeze(-1)
        found = torch.where(is_padding, found.detach(), found)
    here = (own >= 0).unsqueeze(-1)
    return PlacedValue(torch.where(here, found, found.new_zeros(())), stated)
