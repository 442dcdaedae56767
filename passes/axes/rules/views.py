"""Operators that only rename, reorder, cut or join dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ringfx.comm import redistribute, turn
from ringfx.ir import markers
from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, AxisSharing, Call, Labels, OpAxes, Window
from ringfx.passes.axes.rules.pattern import shares

__all__ = ["RULES"]

aten = torch.ops.aten


def numbered(shape: Sequence[int]) -> Labels:
    return tuple((f"d{i}",) if size != 1 else () for i, size in enumerate(shape))


def regroup(call: Call) -> OpAxes:
    """A row-major reshape: the axes are those of the operand, grouped by the result's sizes."""
    return OpAxes(
        operands=(numbered(call.shapes[0]),) + (None,) * (len(call.operands) - 1),
        results=(numbered(call.result_shape),),
        how=how.Reshape(),
    )


def every_token(call: Call) -> OpAxes:
    """``ringfx.ir.markers.every_token``: all of some dimensions, axes of their own from here on."""
    labels = numbered(call.shapes[0])
    dims: Any = call.node.args[1]
    parted = {name for d in dims for name in labels[d]}
    made = tuple(tuple(f"all {x}" if x in parted else x for x in names) for names in labels)
    every = {f"all {x}" for x in parted} | parted
    return OpAxes(
        operands=(labels,), results=(made,), share=shares(needs_all=every),
        reason="every row of scores, a mask or a bias reads all of it",
    )  # fmt: skip


def reordered(call: Call, order: Sequence[int]) -> OpAxes:
    labels = numbered(call.shapes[0])
    return OpAxes(operands=(labels,), results=(tuple(labels[i] for i in order),))


def permute(call: Call) -> OpAxes:
    rank = len(call.shapes[0])
    return reordered(call, [d % rank for d in call["dims"]])


def transpose(call: Call) -> OpAxes:
    rank = len(call.shapes[0])
    order = list(range(rank))
    first, second = (call["dim0"] % rank, call["dim1"] % rank) if rank else (0, 0)
    if rank:
        order[first], order[second] = order[second], order[first]
    return reordered(call, order)


def swap_last(call: Call) -> OpAxes:
    rank = len(call.shapes[0])
    order = list(range(rank))
    if rank >= 2:
        order[-2], order[-1] = order[-1], order[-2]
    return reordered(call, order)


def reverse(call: Call) -> OpAxes:
    return reordered(call, range(len(call.shapes[0]))[::-1])


def movedim(call: Call) -> OpAxes:
    rank = len(call.shapes[0])
    source, target = call["source"], call["destination"]
    sources = [source] if isinstance(source, int) else list(source)
    targets = [target] if isinstance(target, int) else list(target)
    moved = {t % rank: s % rank for s, t in zip(sources, targets, strict=True)}
    rest = iter(d for d in range(rank) if d not in moved.values())
    return reordered(call, [moved[d] if d in moved else next(rest) for d in range(rank)])


def unsqueeze(call: Call) -> OpAxes:
    labels = numbered(call.shapes[0])
    at = call["dim"] % (len(labels) + 1)
    return OpAxes(operands=(labels,), results=((*labels[:at], (), *labels[at:]),))


def expand(call: Call) -> OpAxes:
    result = numbered(call.result_shape)
    skipped = len(result) - len(call.shapes[0])
    given = tuple(result[i + skipped] if size != 1 else () for i, size in enumerate(call.shapes[0]))
    return OpAxes(operands=(given,), results=(result,), how=how.SizeArgument(name="size"))


def repeat(call: Call) -> OpAxes:
    """A repeated dimension is (copy, element): each copy holds the whole axis."""
    shape, times = call.shapes[0], call["repeats"]
    if 0 in times:
        return _anew(call, "it keeps nothing")
    skipped = len(times) - len(shape)
    given = numbered(shape)
    result: list[tuple[str, ...]] = []
    for i, count in enumerate(times):
        copy = (f"copy{i}",) if count != 1 else ()
        result.append(copy + (given[i - skipped] if i >= skipped else ()))
    return OpAxes(operands=(given,), results=(tuple(result),), share=_needed(result, "copy"))


def _needed(dims: Sequence[tuple[str, ...]], prefix: str) -> dict[str, AxisSharing]:
    return shares(needs_all=[label for dim in dims for label in dim if label.startswith(prefix)])


def _anew(call: Call, reason: str) -> OpAxes:
    """Its axes are none of its operands'."""
    out = tuple((f"out{i}",) if s != 1 else () for i, s in enumerate(call.result_shape))
    return OpAxes(
        operands=(None,) * len(call.operands), results=(out,),
        share=shares(needs_all=[x for dim in out for x in dim]), reason=reason,
    )  # fmt: skip


def repeat_interleave(call: Call) -> OpAxes:
    shape = call.shapes[0]
    labels = numbered(shape)
    if call["dim"] is None or not isinstance(call["repeats"], int):
        return _anew(call, "it flattens or repeats by a tensor of counts")
    if call["repeats"] == 0:
        return _anew(call, "it keeps nothing")
    at = call.dim("dim", len(shape))
    result = list(labels)
    result[at] = (*labels[at], "copy") if call["repeats"] != 1 else labels[at]
    given = call.get("output_size") is not None
    return OpAxes(
        operands=(labels,), results=(tuple(result),),
        share=shares(needs_all=["copy", f"d{at}"] if given else ["copy"]),
        reason="it is given the length of its result" if given else "",
    )  # fmt: skip


def slice_(call: Call) -> OpAxes:
    """A full slice is the identity; a part of step 1 is a window of the axis."""
    shape, result = call.shapes[0], call.result_shape
    at = call.dim("dim", len(shape))
    labels = numbered(shape)
    size = shape[at]
    if result[at] == size:
        return regroup(call)
    start = _bounded(call["start"], size, 0)
    out = list(labels)
    if result[at] == 1:
        out[at] = ()
        return picked(call, at, start, tuple(out))
    out[at] = ("window",)
    windows: tuple[Window, ...] = ()
    if call["step"] == 1:
        windows = (Window(f"d{at}", "window", start, result[at]),)
    return OpAxes(
        operands=(labels,),
        results=(tuple(out),),
        share=shares(needs_all=[f"d{at}", "window"]),
        windows=windows,
        reason="it takes a part of the axis",
    )


def picked(call: Call, at: int, element: int, out: Labels) -> OpAxes:
    """One element of a dimension."""
    labels = numbered(call.shapes[0])
    operands = (labels,) + ((),) * (len(call.operands) - 1)
    return OpAxes(
        operands=operands, results=(out,), share=shares(sum=[f"d{at}"]),
        how=how.Pick(element=element),
    )  # fmt: skip


def _bounded(value: int | None, size: int, default: int) -> int:
    if value is None:
        return default
    return max(0, min(size, value + size if value < 0 else value))


def narrow(call: Call) -> OpAxes:
    shape, result = call.shapes[0], call.result_shape
    at = call.dim("dim", len(shape))
    labels = numbered(shape)
    if result[at] == shape[at] and len(call.operands) == 1:
        return regroup(call)
    out = list(labels)
    out[at] = ("window",) if result[at] != 1 else ()
    start = call["start"]
    known = isinstance(start, int)
    if known and result[at] == 1:
        return picked(call, at, start % shape[at], tuple(out))
    windows = (Window(f"d{at}", "window", start % shape[at], result[at]),) if known else ()
    return OpAxes(
        operands=(numbered(shape),) + ((),) * (len(call.operands) - 1),
        results=(tuple(out),),
        share=shares(needs_all=[f"d{at}", "window"]),
        windows=windows,
        reason="it takes a part of the axis",
    )


def parts(call: Call) -> OpAxes:
    """split, chunk: every result is a window of the axis, also where there is only one."""
    shape = call.shapes[0]
    at = call.dim("dim", len(shape))
    labels = numbered(shape)
    results: list[Labels] = []
    windows: list[Window] = []
    start = 0
    for i, part in enumerate(call.result_shapes):
        dims = list(labels)
        if part[at] == shape[at] and "split_sizes" not in call.arguments:
            return OpAxes(operands=(labels,), results=(labels,))
        dims[at] = (f"part{i}",) if part[at] != 1 else ()
        if part[at] != 1:
            windows.append(Window(f"d{at}", f"part{i}", start, part[at]))
        start += part[at]
        results.append(tuple(dims))
    return OpAxes(
        operands=(labels,),
        results=tuple(results),
        share=shares(needs_all=[f"d{at}", *(w.result for w in windows)]),
        windows=tuple(windows),
        reason="it cuts the axis into parts",
    )


def select(call: Call) -> OpAxes:
    """One element of an axis: its owner's, and zero from everyone else."""
    labels = numbered(call.shapes[0])
    at = call.dim("dim", len(labels))
    return picked(call, at, call["index"] % call.shapes[0][at], labels[:at] + labels[at + 1 :])


def unbind(call: Call) -> OpAxes:
    labels = numbered(call.shapes[0])
    at = call.dim("dim", len(labels))
    rest = labels[:at] + labels[at + 1 :]
    return OpAxes(
        operands=(labels,),
        results=(rest,) * max(len(call.result_shapes), 1),
        share=shares(needs_all=[f"d{at}"]),
        reason="it takes single elements of the axis",
    )


def cat(call: Call) -> OpAxes:
    """Each operand is a window of the result."""
    rank = len(call.result_shape)
    at = call.dim("dim", rank)
    out = list(numbered(call.result_shape))
    operands: list[Labels] = []
    windows: list[Window] = []
    starts: list[int] = []
    start = 0
    for i, shape in enumerate(call.shapes):
        starts.append(start)
        if len(shape) != rank:  # legacy empty tensor
            operands.append(tuple(() for _ in shape))
            continue
        dims = list(numbered(shape))
        dims[at] = (f"part{i}",) if shape[at] != 1 else ()
        operands.append(tuple(dims))
        if shape[at] > 1:
            windows.append(Window(f"d{at}", f"part{i}", start, int(shape[at])))
        start += int(shape[at])
    if len(call.shapes) == 1:
        return OpAxes(operands=(tuple(out),), results=(tuple(out),))
    return OpAxes(
        operands=tuple(operands),
        results=(tuple(out),),
        share=shares(needs_all=[*(f"part{i}" for i in range(len(call.shapes))), f"d{at}"]),
        windows=tuple(windows),
        how=how.Concat(dim=at, starts=tuple(starts)),
        reason="it joins tensors along the axis",
    )


def stack(call: Call) -> OpAxes:
    at = call.dim("dim", len(call.result_shape))
    labels = numbered(call.shapes[0])
    joined = ("stacked",) if len(call.shapes) != 1 else ()
    return OpAxes(
        operands=(labels,) * len(call.shapes),
        results=((*labels[:at], joined, *labels[at:]),),
        share=shares(needs_all=joined),
    )


def pad(call: Call) -> OpAxes:
    shape, result = call.shapes[0], call.result_shape
    operand, out, grown = [], [], []
    for i, (before, after) in enumerate(zip(shape, result, strict=True)):
        label = (f"d{i}",)
        operand.append(label if before != 1 else ())
        if before == after and not _padded(call["pad"], i, len(shape)):
            out.append(label if after != 1 else ())
        else:
            out.append((f"grown{i}",) if after != 1 else ())
            grown += [f"d{i}", f"grown{i}"]
    return OpAxes(
        operands=(tuple(operand),),
        results=(tuple(out),),
        share=shares(needs_all=grown),
        reason="it pads the axis",
    )


def _padded(amounts: Sequence[int], dim: int, rank: int) -> bool:
    at = 2 * (rank - 1 - dim)
    return any(amounts[at : at + 2])


def unfold(call: Call) -> OpAxes:
    """Overlapping windows of one dimension, whose elements become the last one."""
    labels = numbered(call.shapes[0])
    at = call.dim("dimension", len(labels))
    windows: Labels = (("windows",) if call.result_shape[at] != 1 else (),)
    inside: Labels = (("inside",) if call.result_shape[-1] != 1 else (),)
    return OpAxes(
        operands=(labels,), results=((*labels[:at], *windows, *labels[at + 1 :], *inside),),
        share=shares(needs_all=[f"d{at}", "windows", "inside"]),
        reason="its windows of the axis overlap",
    )  # fmt: skip


def along(*names: str, reason: str) -> AxisRule:
    """Shape-keeping operators that need all of the named dimensions."""

    def rule(call: Call) -> OpAxes:
        shape = call.shapes[0]
        labels = numbered(shape)
        dims: list[int] = []
        for name in names:
            value = call[name]
            if value is None or (isinstance(value, (list, tuple)) and not value):
                dims += range(len(shape))
            elif isinstance(value, int):
                dims.append(value % max(len(shape), 1))
            else:
                dims += [v % len(shape) for v in value]
        needed = [f"d{d}" for d in dims]
        return OpAxes(
            operands=(labels,) + (None,) * (len(call.operands) - 1),
            results=(labels,) * len(call.result_shapes),
            share=shares(needs_all=needed),
            reason=reason,
        )

    return rule


def roll(call: Call) -> OpAxes:
    """The same axis, its elements a few places further; the last ones come first."""
    axes = along("dims", reason="it shifts the axis")(call)
    dims = [d % len(call.shapes[0]) for d in call["dims"]]
    if len(dims) != 1:
        return axes
    return replace(axes, how=how.Roll(dim=dims[0], shift=call["shifts"][0]))


def flip(call: Call) -> OpAxes:
    """The same axis in the reverse order."""
    rank = len(call.shapes[0])
    axes = along("dims", reason="it reverses the axis")(call)
    return replace(axes, how=how.Flip(dims=frozenset(d % rank for d in call["dims"])))


def triangle(call: Call) -> OpAxes:
    labels = numbered(call.shapes[0])
    needed = [label for dim in labels[-2:] for label in dim]
    return OpAxes(
        operands=(labels,), results=(labels,), share=shares(needs_all=needed),
        reason="it reads global row and column numbers",
    )  # fmt: skip


def pairs(call: Call) -> OpAxes:
    """view_as_complex and view_as_real: two numbers of the last dimension are one, or back."""
    return OpAxes(
        operands=(_with_pair(call.shapes[0], call.shapes[0], call.result_shape),),
        results=(_with_pair(call.result_shape, call.shapes[0], call.result_shape),),
        share=shares(needs_all=["pair"]),
    )


def _with_pair(shape: Sequence[int], before: Sequence[int], after: Sequence[int]) -> Labels:
    common = min(len(before), len(after))
    return numbered(shape[:common]) + (("pair",),) * (len(shape) - common)


def resharded(call: Call) -> OpAxes:
    """``ringfx.comm.redistribute.reshard``: from one axis to another with the same elements."""
    labels = list(numbered(call.shapes[0]))
    at = call.node.args[1]
    assert isinstance(at, int)
    results = (*labels[:at], ("moved",), *labels[at + 1 :])
    return OpAxes(
        operands=(tuple(labels),), results=(results,), how=how.Reshard(),
        reason="what reads it needs all of it",
    )  # fmt: skip


def turned(call: Call) -> OpAxes:
    """``ringfx.comm.turn.turn``: from one dimension to another."""
    labels = list(numbered(call.shapes[0]))
    ends, starts = call.node.args[1:]
    results = tuple(
        ("ended",) if i == ends else ("started",) if i == starts else label
        for i, label in enumerate(labels)
    )
    return OpAxes(
        operands=(tuple(labels),), results=(results,), how=how.Reshard(),
        reason="its result is not sharded",
    )  # fmt: skip


def apart(call: Call) -> OpAxes:
    """``ringfx.comm.turn.apart``: every dimension is new."""
    labels = numbered(call.shapes[0])
    results = tuple(tuple(f"new {x}" for x in label) for label in labels)
    return OpAxes(
        operands=(labels,), results=(results,), how=how.Reshard(),
        reason="its result is not sharded",
    )  # fmt: skip


RULES: dict[object, AxisRule] = {
    turn.turn: turned,
    turn.apart: apart,
    markers.every_token: every_token,
    redistribute.reshard: resharded,
    aten.view_as_complex.default: pairs,
    aten.view_as_real.default: pairs,
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default,
            aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim,
            aten.squeeze.dims, aten.view_as.default, aten.reshape_as.default, aten.ravel.default,
            aten.atleast_2d.default, aten.atleast_1d.default,
        ),
        regroup,
    ),
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.swapaxes.default: lambda call: _swap(call, "axis0", "axis1"),
    aten.swapdims.default: transpose,
    aten.t.default: swap_last,
    aten.mT.default: swap_last,
    aten.adjoint.default: swap_last,
    aten.numpy_T.default: reverse,
    aten.movedim.int: movedim,
    aten.movedim.intlist: movedim,
    aten.moveaxis.int: movedim,
    aten.moveaxis.intlist: movedim,
    aten.unsqueeze.default: unsqueeze,
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.repeat_interleave.self_Tensor: repeat_interleave,
    aten.slice.Tensor: slice_,
    aten.narrow.default: narrow,
    aten.split.Tensor: parts,
    aten.split_with_sizes.default: parts,
    aten.chunk.default: parts,
    aten.tensor_split.sections: parts,
    aten.select.int: select,
    aten.unbind.int: unbind,
    aten.cat.default: cat,
    aten.concat.default: cat,
    aten.stack.default: stack,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.flip.default: flip,
    aten.roll.default: roll,
    aten.unfold.default: unfold,
    aten.tril.default: triangle,
    aten.triu.default: triangle,
}  # fmt: skip


def _swap(call: Call, first: str, second: str) -> OpAxes:
    rank = len(call.shapes[0])
    order = list(range(rank))
    a, b = call[first] % rank, call[second] % rank
    order[a], order[b] = order[b], order[a]
    return reordered(call, order)
