"""Rows written as patterns: ``axes(self="r m", mat2="m c", out="r c", sum="m")``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ringfx.passes.axes.call import AxisRule, AxisSharing, Call, Labels, OpAxes
from ringfx.passes.axes.how import Sum

__all__ = ["axes", "labels_like", "leading", "shares"]


def axes(
    *,
    out: str | Sequence[str],
    sum: str = "",
    needs_all: str = "",
    mean: bool = False,
    fill: Mapping[str, float] | None = None,
    reason: str = "",
    **operands: str,
) -> AxisRule:
    """A rule from one pattern for each tensor argument and result.

    A pattern lists labels, slowest dimension first; ``...`` stands for any leading dimensions and
    aligns to the right, as broadcasting does. ``sum`` and ``needs_all`` list labels; all others
    are independent.
    """
    outs = (out,) if isinstance(out, str) else tuple(out)

    def rule(call: Call) -> OpAxes:
        sizes = _sizes(call, operands)
        given: dict[int, Labels] = {}
        fills: dict[int, float] = {}
        for name, pattern in operands.items():
            if call.get(name) is None:
                continue
            at = call.position(name)
            given[at] = labels_like(call.shape(name), pattern, sizes)
            if fill and name in fill:
                fills[at] = fill[name]
        results = tuple(
            labels_like(shape, pattern, sizes)
            for shape, pattern in zip(call.result_shapes, outs, strict=False)
        )
        return OpAxes(
            operands=tuple(given.get(i) for i in range(len(call.operands))),
            results=results,
            share=shares(sum=sum.split(), needs_all=needs_all.split()),
            how=Sum(fill=fills, mean=mean) if fills or mean else None,
            reason=reason,
        )

    return rule


def shares(*, sum: Iterable[str] = (), needs_all: Iterable[str] = ()) -> dict[str, AxisSharing]:
    summed = dict.fromkeys(sum, AxisSharing.PARTIAL_SUM)
    return summed | dict.fromkeys(needs_all, AxisSharing.NEEDS_ALL)


def leading(rank: int) -> list[str]:
    """Names of the dimensions that ``...`` stands for, aligned to the right."""
    return [f"...{rank - i}" for i in range(rank)]


def labels_like(shape: Sequence[int], pattern: str, sizes: Mapping[str, int]) -> Labels:
    """The pattern's labels for a tensor of this shape; size-1 dimensions broadcast."""
    names: list[str] = []
    words = pattern.split()
    for word in words:
        names += leading(len(shape) - len(words) + 1) if word == "..." else [word]
    return tuple(
        () if size == 1 and sizes.get(name, 1) != 1 else ((name,) if size != 1 else ())
        for name, size in zip(names, shape, strict=True)
    )


def _sizes(call: Call, operands: Mapping[str, str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, pattern in operands.items():
        if call.get(name) is None:
            continue
        shape = call.shape(name)
        words = pattern.split()
        names: list[str] = []
        for word in words:
            names += leading(len(shape) - len(words) + 1) if word == "..." else [word]
        for label, size in zip(names, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return sizes
