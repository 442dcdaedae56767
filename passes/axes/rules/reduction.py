"""Operators that reduce, scan or sort along dimensions."""

from __future__ import annotations

import torch

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.views import along, numbered
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES"]

aten = torch.ops.aten


def reduce(
    *, partial: bool = False, mean: bool = False, reason: str = "it reduces the axis"
) -> AxisRule:
    """A reduction over ``dim`` (all dimensions when None); only sums leave a partial result."""

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
            how=how.Sum(fill={0: 0}, mean=mean) if partial else None,
            reason=reason,
        )

    return rule


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


def transform(call: Call) -> OpAxes:
    """A Fourier transform along ``dim``; some change the length."""
    shape, result = call.shapes[0], call.result_shape
    labels, out = numbered(shape), list(numbered(result))
    dims = call.get("dim")
    lengths = call.get("s")
    if dims is None and lengths is not None:
        dims = list(range(-len(lengths), 0))
    at = _dims(dims, len(shape))
    for i in at:
        if result[i] != shape[i]:
            out[i] = (f"f{i}",) if result[i] != 1 else ()
    return OpAxes(
        operands=(labels,),
        results=(tuple(out),),
        share=shares(needs_all=[name for i in at for name in (f"d{i}", f"f{i}")]),
        reason="it transforms along the axis",
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


_NEEDS_ALL = reduce()
_SCAN = along("dim", reason="it scans along the axis")
_SOFTMAX = along("dim", reason="it normalises along the axis")

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
            aten.min.dim, aten.prod.default, aten.prod.dim_int, aten.any.default, aten.any.dim,
            aten.all.default, aten.all.dim, aten.argmax.default, aten.argmin.default,
            aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction, aten.std.dim,
            aten.var_mean.correction, aten.logsumexp.default, aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.median.default, aten.median.dim,
            aten.nanmedian.default, aten.nanmedian.dim, aten.kthvalue.default, aten.mode.default,
            aten.all.dims, aten.any.dims, aten.aminmax.default, aten.std_mean.correction,
            aten.norm.ScalarOpt_dtype, aten.norm.ScalarOpt_dim_dtype,
        ),
        _NEEDS_ALL,
    ),
    aten.softmax.int: _SOFTMAX,
    aten._softmax.default: _SOFTMAX,
    aten._safe_softmax.default: _SOFTMAX,
    aten.log_softmax.int: _SOFTMAX,
    aten._log_softmax.default: _SOFTMAX,
    aten.cumsum.default: _SCAN,
    aten.cumprod.default: _SCAN,
    aten.logcumsumexp.default: _SCAN,
    aten.cummax.default: _SCAN,
    aten.cummin.default: _SCAN,
    aten.sort.default: ordered,
    aten.sort.stable: ordered,
    aten.argsort.default: ordered,
    aten.argsort.stable: ordered,
    aten.histc.default: histogram,
    aten.bincount.default: histogram,
    aten.topk.default: topk,
    aten.renorm.default: renormed,
    aten.diff.default: diff,
    aten.fft_fft.default: transform,
    aten.fft_ifft.default: transform,
    aten.fft_rfft.default: transform,
    aten.fft_irfft.default: transform,
    aten.fft_fft2.default: transform,
    aten.fft_ifft2.default: transform,
    aten.fft_fftn.default: transform,
    aten.fft_ifftn.default: transform,
    aten.fft_rfftn.default: transform,
    aten.fft_irfftn.default: transform,
}  # fmt: skip
