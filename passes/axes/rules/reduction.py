"""Operators that reduce, scan or sort along dimensions."""

from __future__ import annotations

from dataclasses import replace

import torch

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.views import along, numbered
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES"]

aten = torch.ops.aten


def reduce(
    *,
    partial: bool = False,
    mean: bool = False,
    of_parts: bool = False,
    reason: str = "it reduces the axis",
) -> AxisRule:
    """A reduction over ``dim`` (all dimensions when None); only sums leave a partial result.

    ``of_parts``: it is that of the results of parts.
    """

    def rule(call: Call) -> OpAxes:
        shape = call.shapes[0]
        labels = numbered(shape)
        reduced = _dims(call.get("dim"), len(shape))
        keep = bool(call.get("keepdim", False))
        out = tuple(
            () if i in reduced else label
            for i, label in enumerate(labels)
            if keep or i not in reduced
        )
        names = [f"d{i}" for i in reduced]
        return OpAxes(
            operands=(labels,) + (None,) * (len(call.operands) - 1),
            results=(out,) * len(call.result_shapes),
            share=shares(sum=names) if partial else shares(needs_all=names),
            how=_how(reduced, partial, mean, of_parts),
            reason=reason,
        )

    return rule


def _how(dims: frozenset[int], partial: bool, mean: bool, of_parts: bool) -> how.How | None:
    if of_parts:
        return how.Reduce(dims=dims)
    return how.Sum(fill={0: 0}, mean=mean) if partial else None


def _dims(value: object, rank: int) -> frozenset[int]:
    if value is None or value == []:
        return frozenset(range(rank))
    if isinstance(value, int):
        return frozenset({value % max(rank, 1)})
    assert isinstance(value, (list, tuple)), value
    return frozenset(int(v) % max(rank, 1) for v in value)


def diff(call: Call) -> OpAxes:
    shape = call.shapes[0]
    at = call.dim("dim", len(shape))
    labels = numbered(shape)
    out = list(numbered(call.result_shape))
    out[at] = ("diff",) if call.result_shape[at] != 1 else ()
    return OpAxes(
        operands=(labels,) + (None,) * (len(call.operands) - 1),
        results=(tuple(out),),
        share=shares(needs_all=[f"d{at}", "diff"]),
        reason="it compares neighbours along the axis",
    )


def histogram(call: Call) -> OpAxes:
    """Counts of values in a range add up; what lies outside of it is not counted."""
    labels = numbered(call.shapes[0])
    every = [x for dim in labels for x in dim]
    bins: Labels = (("bin",) if call.result_shape[0] != 1 else (),)
    ranged = "min" in call.arguments and call["min"] != call["max"]
    return OpAxes(
        operands=(labels,) + (None,) * (len(call.operands) - 1),
        results=(bins,),
        share=shares(sum=every if ranged else [], needs_all=["bin", *([] if ranged else every)]),
        how=how.Sum(fill={0: call["min"] - 1}) if ranged else None,
        reason="it counts along the axis",
    )


def ordered(call: Call) -> OpAxes:
    """A sort: its results are the same elements in another order."""
    shape = call.shapes[0]
    labels = numbered(shape)
    at = call.dim("dim", len(shape))
    out = list(labels)
    if labels:
        out[at] = ("ordered",) if shape[at] != 1 else ()
    return OpAxes(
        operands=(labels,),
        results=(tuple(out),) * len(call.result_shapes),
        share=shares(needs_all=[f"d{at}", "ordered"]),
        reason="it sorts the axis",
    )


def topk(call: Call) -> OpAxes:
    shape = call.shapes[0]
    at = call.dim("dim", len(shape))
    labels = numbered(shape)
    out = list(labels)
    out[at] = ("k",) if call.result_shape[at] != 1 else ()
    return OpAxes(
        operands=(labels,),
        results=(tuple(out),) * len(call.result_shapes),
        share=shares(needs_all=[f"d{at}", "k"]),
        reason="it ranks the axis",
    )


def renormed(call: Call) -> OpAxes:
    """Each slice along ``dim`` is scaled by its own norm."""
    shape = call.shapes[0]
    labels = numbered(shape)
    kept = call.dim("dim", len(shape))
    return OpAxes(
        operands=(labels,),
        results=(labels,),
        share=shares(needs_all=[f"d{i}" for i in range(len(shape)) if i != kept]),
        reason="it takes a norm over the axis",
    )


def scan(call: Call) -> OpAxes:
    axes = along("dim", reason="it scans along the axis")(call)
    return replace(axes, how=how.Scan(dim=call.dim("dim", len(call.shapes[0]))))


def softmax(call: Call) -> OpAxes:
    axes = along("dim", reason="it normalises along the axis")(call)
    return replace(axes, how=how.Normalise(dim=call.dim("dim", len(call.shapes[0]))))


_NEEDS_ALL = reduce()
_OF_PARTS = reduce(of_parts=True)

RULES: dict[OpOverload, AxisRule] = {
    aten.sum.default: reduce(partial=True),
    aten.sum.dim_IntList: reduce(partial=True),
    aten.mean.default: reduce(partial=True, mean=True),
    aten.mean.dim: reduce(partial=True, mean=True),
    aten.count_nonzero.dim_IntList: reduce(partial=True),
    aten.count_nonzero.default: reduce(partial=True),
    aten.nansum.default: reduce(partial=True),
    **dict.fromkeys(
        (
            aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.max.dim,
            aten.min.dim, aten.any.default, aten.any.dim, aten.any.dims, aten.all.default,
            aten.all.dim, aten.all.dims, aten.logsumexp.default,
        ),
        _OF_PARTS,
    ),
    **dict.fromkeys(
        (
            aten.prod.default, aten.prod.dim_int, aten.argmax.default, aten.argmin.default,
            aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction, aten.std.dim,
            aten.var_mean.correction, aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.median.default, aten.median.dim,
            aten.nanmedian.default, aten.nanmedian.dim, aten.kthvalue.default, aten.mode.default,
            aten.aminmax.default, aten.std_mean.correction,
            aten.norm.ScalarOpt_dtype, aten.norm.ScalarOpt_dim_dtype,
        ),
        _NEEDS_ALL,
    ),
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten._safe_softmax.default: softmax,
    aten.log_softmax.int: softmax,
    aten._log_softmax.default: softmax,
    aten.cumsum.default: scan,
    aten.cumprod.default: scan,
    aten.logcumsumexp.default: scan,
    aten.cummax.default: scan,
    aten.cummin.default: scan,
    aten.sort.default: ordered,
    aten.sort.stable: ordered,
    aten.argsort.default: ordered,
    aten.argsort.stable: ordered,
    aten.histc.default: histogram,
    aten.bincount.default: histogram,
    aten.topk.default: topk,
    aten.renorm.default: renormed,
    aten.diff.default: diff,
}  # fmt: skip
