"""Products: linear layers, matrix products, einsum, convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch

from ringfx.comm import halo, halo_pools, halo_transposed
from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, AxisSharing, Call, Labels, OpAxes, Window
from ringfx.passes.axes.rules.pattern import axes, labels_like, leading, shares

__all__ = ["RULES"]

aten = torch.ops.aten
NEIGHBOURS = "its kernel sees neighbours along the axis"


def matmul(call: Call) -> OpAxes:
    """torch.matmul in every rank: leading dimensions broadcast, m is contracted."""
    left, right = call.shapes
    a = (*leading(max(len(left) - 2, 0)), "r", "m")[-len(left) :] if len(left) > 1 else ("m",)
    b = (*leading(max(len(right) - 2, 0)), "m", "c")[-len(right) :] if len(right) > 1 else ("m",)
    sizes: dict[str, int] = {}
    for names, shape in ((a, left), (b, right)):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    tail = [name for name in ("r", "c") if name in a or name in b]
    batch = leading(len(call.result_shape) - len(tail))
    return OpAxes(
        operands=(labels_like(left, " ".join(a), sizes), labels_like(right, " ".join(b), sizes)),
        results=(labels_like(call.result_shape, " ".join([*batch, *tail]), sizes),),
        share={"m": AxisSharing.PARTIAL_SUM},
        how=how.Sum(fill={0: 0, 1: 0}),
    )


def einsum(call: Call) -> OpAxes:
    """Letters are labels; dots stand for letters of their own, a missing result is written out."""
    written = _written(call["equation"].replace(" ", ""), [len(shape) for shape in call.shapes])
    if written is None:
        labels = tuple(_all_whole(shape, i) for i, shape in enumerate(call.shapes))
        result = _all_whole(call.result_shape, "out")
        every = [x for dims in (*labels, result) for dim in dims for x in dim]
        return OpAxes(
            operands=labels, results=(result,), share=shares(needs_all=every),
            reason="an einsum that takes diagonals",
        )  # fmt: skip
    terms, right = written
    operands = tuple(
        tuple((c,) if size != 1 else () for c, size in zip(term, shape, strict=True))
        for term, shape in zip(terms, call.shapes, strict=True)
    )
    result_labels = tuple(
        (c,) if size != 1 else () for c, size in zip(right, call.result_shape, strict=True)
    )
    summed = sorted(set("".join(terms)) - set(right))
    return OpAxes(
        operands=operands, results=(result_labels,), share=shares(sum=summed),
        how=how.Sum(fill=dict.fromkeys(range(len(terms)), 0)),
    )  # fmt: skip


def _written(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Each operand's letters and the result's; None where an operand repeats a letter.

    Dots become digits, aligned to the right; a result that is not given has the dots and then the
    letters that occur once, in alphabetical order.
    """
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    dots = ["".join(str(i) for i in range(r - len(t) + 3))[::-1] if "..." in t else ""
            for t, r in zip(terms, ranks, strict=True)]  # fmt: skip
    widest = max(dots, key=len)
    terms = [t.replace("...", d) for t, d in zip(terms, dots, strict=True)]
    if any(len(set(t)) != len(t) for t in terms):
        return None
    letters = "".join(terms)
    once = "".join(sorted(c for c in set(letters) if c.isalpha() and letters.count(c) == 1))
    return terms, right.replace("...", widest) if arrow else widest + once


def convolution(call: Call) -> OpAxes:
    """Batch stays local; space too where the kernel sees one point; channels are contracted.

    Output channels stay local without groups, which tie them to input channels.
    """
    names = ("input", "weight", "bias")
    x, w = call.shape("input"), call.shape("weight")
    if call.get("transposed"):
        return _only_batch(call)
    stride, padding = call["stride"], call["padding"]
    points = [
        w[2 + i] == 1 and _at(stride, i) == 1 and (isinstance(padding, str) or not _at(padding, i))
        for i in range(len(x) - 2)
    ]
    space = [(f"s{i}",) if point else (f"in{i}",) for i, point in enumerate(points)]
    after = [(f"s{i}",) if point else (f"out{i}",) for i, point in enumerate(points)]
    by_name: dict[str, Labels] = {
        "input": _sized((("n",), ("c",), *space), x),
        "weight": _sized((("o",), ("w",), *((f"k{i}",) for i in range(len(space)))), w),
        "bias": (("o",),),
    }
    labels = tuple(by_name[name] for name in names if call[name] is not None)
    seen = [dim[0] for dim in (*space, *after) if not dim[0].startswith("s")]
    return OpAxes(
        operands=labels,
        results=(_sized((("n",), ("o",), *after), call.result_shape),),
        share=shares(needs_all=["c", "w", *seen, *(["o"] if call["groups"] != 1 else [])]),
        reason="its kernel sees neighbours along the axis",
    )


def columns(call: Call) -> OpAxes:
    """im2col: what a convolution's kernel sees at each place, as channels."""
    x, result = call.shapes[0], call.result_shape
    batch: Labels = ((("n",) if x[0] != 1 else ()),) if len(x) == 4 else ()
    given = batch + _all_whole(x[len(batch) :], "in")
    made = batch + _all_whole(result[len(batch) :], "out")
    every = [name for labels in (given, made) for dim in labels for name in dim if name != "n"]
    return OpAxes(
        operands=(given,), results=(made,), share=shares(needs_all=every),
        reason="its windows see neighbours along the axis",
    )  # fmt: skip


def _only_batch(call: Call) -> OpAxes:
    x, result = _all_whole(call.shape("input"), "in"), _all_whole(call.result_shape, "out")
    rest = tuple(_all_whole(shape, f"w{i}") for i, shape in enumerate(call.shapes[1:]))
    batch: Labels = ((("n",) if call.result_shape[0] != 1 else ()),)
    every = [name for dims in (x[1:], *rest, result[1:]) for dim in dims for name in dim]
    return OpAxes(
        operands=(batch + x[1:], *rest), results=(batch + result[1:],),
        share=shares(needs_all=every), reason="a transposed convolution sees neighbours",
    )  # fmt: skip


def _at(value: int | Sequence[int], i: int) -> int:
    return value if isinstance(value, int) else value[i % len(value)]


def _sized(labels: Labels, shape: Sequence[int]) -> Labels:
    return tuple(label if size != 1 else () for label, size in zip(labels, shape, strict=True))


def _all_whole(shape: torch.Size, prefix: object) -> Labels:
    return tuple((f"{prefix}.{i}",) if size != 1 else () for i, size in enumerate(shape))


def linear(call: Call) -> OpAxes:
    """A bias is added once, so a contraction over tokens may be partial only without one."""
    contracted = "needs_all" if call["bias"] is not None else "sum"
    rows = "n " if len(call.shape("weight")) == 2 else ""
    return axes(
        input="... m", weight=f"{rows}m", bias=rows, out=f"... {rows}",
        fill={"input": 0, "weight": 0},
        **{contracted: "m"},  # type: ignore[arg-type]
        reason="it contracts the axis and adds a bias",
    )(call)  # fmt: skip


def biased(product: AxisRule, out: str) -> AxisRule:
    """A product added to ``self``, which broadcasts to it."""

    def rule(call: Call) -> OpAxes:
        axes_of_product = product(call)
        shape = call.shape("self")
        names = out.split()[len(out.split()) - len(shape) :]
        bias = tuple((n,) if size != 1 else () for n, size in zip(names, shape, strict=True))
        return replace(axes_of_product, operands=(bias, *axes_of_product.operands[1:]))

    return rule


def near_convolution(call: Call) -> OpAxes:
    """``ringfx.comm.halo.convolution``: tokens stay tokens, and each looks at a few neighbours."""
    x, w = call.shapes[0], call.shapes[1]
    near = _near(call, [int(n) for n in w[2:]])
    kernel = tuple((f"k{i}",) for i in range(len(w) - 2))
    operands: list[Labels] = [
        _sized((("n",), ("c",), *near.before), x),
        _sized((("o",), ("w",), *kernel), w),
    ]
    operands += [(("o",),)] if len(call.operands) == 3 else []
    local = near.local | {"n"} | ({"o"} if call["groups"] == 1 else set())
    return _of_near(near, operands, _sized((("n",), ("o",), *near.after), call.result_shape), local)


def near_pool(call: Call) -> OpAxes:
    """``ringfx.comm.halo_pools.pool``: as a convolution, of each channel by itself; where each
    element is kept, those of a window are further dimensions."""
    near = _near(call, call["kernel"])
    given = _sized((("n",), ("c",), *near.before), call.shapes[0])
    seen = tuple((f"k{i}",) for i in range(len(call.result_shape) - len(call.shapes[0])))
    made = _sized((("n",), ("c",), *near.after, *seen), call.result_shape)
    return _of_near(near, [given], made, near.local | {"n", "c"})


def near_transposed(call: Call) -> OpAxes:
    """``halo_transposed.transposed_convolution``: a stride makes each token so many elements."""
    x, w = call.shapes[0], call.shapes[1]
    given: list[tuple[str, ...]] = []
    made: list[tuple[str, ...]] = []
    sizes: dict[str, int] = {}
    near: set[int] = set()
    for i, stride in enumerate(call["stride"]):
        token, size = f"t{i}", int(x[2 + i])
        if int(call.result_shape[2 + i]) != stride * size:
            given.append((f"in{i}",))
            made.append((f"out{i}",))
            continue
        given.append((token,))
        made.append((token,) if stride == 1 else (token, f"phase{i}"))
        sizes |= {token: size} | ({f"phase{i}": stride} if stride > 1 else {})
        near.add(2 + i)
    few = _Near(
        before=tuple(given), after=tuple(made), sizes=sizes, windows=(), dims=frozenset(near),
        local=frozenset(),
    )  # fmt: skip
    kernel = tuple((f"k{i}",) for i in range(len(w) - 2))
    one = "o" if call["groups"] == 1 else "v"
    operands: list[Labels] = [
        _sized((("n",), ("c",), *few.before), x),
        _sized((("w",), (one,), *kernel), w),
    ]
    operands += [_sized((("o",),), call.shapes[2])] if len(call.operands) == 3 else []
    local = {"n"} | ({"o"} if call["groups"] == 1 else set())
    return _of_near(few, operands, _sized((("n",), ("o",), *few.after), call.result_shape), local)


@dataclass(frozen=True, kw_only=True)
class _Near:
    """Dimensions along which windows run."""

    before: Labels
    after: Labels
    sizes: Mapping[str, int]
    windows: tuple[Window, ...]
    dims: frozenset[int]
    local: frozenset[str]
    """Labels of dimensions of which each window is one element."""


def _near(call: Call, kernel: Sequence[int]) -> _Near:
    """Stride 1 keeps the axis, or a window of it; a stride that divides the length makes a token of
    as many elements as it steps over."""
    x, result = call.shapes[0], call.result_shape
    before: list[tuple[str, ...]] = []
    after: list[tuple[str, ...]] = []
    sizes: dict[str, int] = {}
    windows: list[Window] = []
    near: set[int] = set()
    local: set[str] = set()
    for i, (stride, pads) in enumerate(zip(call["stride"], call["pads"], strict=True)):
        given, made = int(x[2 + i]), int(result[2 + i])
        token, source, out = f"t{i}", f"in{i}", f"out{i}"
        if stride == 1 and made == given:
            before.append((token,))
            after.append((token,))
            local |= {token} if kernel[i] == 1 and tuple(pads) == (0, 0) else set()
        elif stride == 1:
            before.append((source,))
            after.append((out,))
            longer, shorter = (source, out) if given > made else (out, source)
            windows.append(Window(longer, shorter, abs(given - made) // 2, min(given, made)))
        elif given == stride * made:
            before.append((token, f"phase{i}"))
            after.append((token,))
            sizes |= {token: made, f"phase{i}": stride}
        else:
            before.append((source,))
            after.append((out,))
            continue
        near.add(2 + i)
    return _Near(
        before=tuple(before), after=tuple(after), sizes=sizes, windows=tuple(windows),
        dims=frozenset(near), local=frozenset(local),
    )  # fmt: skip


def _of_near(near: _Near, operands: Sequence[Labels], result: Labels, local: Set[str]) -> OpAxes:
    every = {name for labels in (*operands, result) for dim in labels for name in dim}
    return OpAxes(
        operands=tuple(operands), results=(result,), share=shares(needs_all=every - local),
        sizes=near.sizes, windows=near.windows, how=how.Halo(dims=near.dims), reason=NEIGHBOURS,
    )  # fmt: skip


def grouped_product(call: Call) -> OpAxes:
    """Rows times the matrix of their group; where groups end is known from all rows only."""
    x, weights, *ends = call.operands
    labels: tuple[Labels | None, ...] = (("row",), ("m",)), (("e",), ("m",), ("n",)), (("e",),)
    assert [len(n.meta["val"].shape) for n in (x, weights, *ends)] == [2, 3, 1], call.name
    return OpAxes(
        operands=labels, results=((("row",), ("n",)),), share=shares(needs_all=["row", "m", "e"]),
        reason="where its groups of rows end depends on all of them",
    )  # fmt: skip


GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
"""Products of rows that are sorted by group, by name: not all are torch's own."""

CONVOLUTIONS = frozenset({
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
    aten.conv1d.padding, aten.conv2d.padding,
})  # fmt: skip

RULES: dict[object, AxisRule] = {
    halo.convolution: near_convolution,
    halo_pools.pool: near_pool,
    halo_transposed.transposed_convolution: near_transposed,
    **dict.fromkeys(GROUPED, grouped_product),
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: axes(self="r m", mat2="m c", out="r c", sum="m", fill={"self": 0, "mat2": 0}),
    aten.bmm.default: axes(
        self="b r m", mat2="b m c", out="b r c", sum="m", fill={"self": 0, "mat2": 0}
    ),
    aten.mv.default: axes(self="r m", vec="m", out="r", sum="m", fill={"self": 0, "vec": 0}),
    aten.addmm.default: biased(axes(mat1="r m", mat2="m c", out="r c", needs_all="m"), "r c"),
    aten.baddbmm.default: biased(
        axes(batch1="b r m", batch2="b m c", out="b r c", needs_all="m"), "b r c"
    ),
    aten.einsum.default: einsum,
    **dict.fromkeys(CONVOLUTIONS, convolution),
    aten.im2col.default: columns,
    **dict.fromkeys(
        (aten._cdist_forward.default, aten._euclidean_dist.default),
        axes(
            x1="... r m", x2="... c m", out="... r c", needs_all="m",
            reason="it measures along the axis",
        ),
    ),
    aten.dot.default: axes(self="m", tensor="m", out="", sum="m", fill={"self": 0, "tensor": 0}),
    aten.vdot.default: axes(self="m", other="m", out="", sum="m", fill={"self": 0, "other": 0}),
    aten.grid_sampler_2d.default: axes(
        input="n c h w", grid="n y x xy", out="n c y x", needs_all="h w xy",
        reason="it looks anywhere along the axis",
    ),
    aten.grid_sampler_3d.default: axes(
        input="n c d h w", grid="n z y x xyz", out="n c z y x", needs_all="d h w xyz",
        reason="it looks anywhere along the axis",
    ),
    aten.outer.default: axes(self="r", vec2="c", out="r c"),
}  # fmt: skip
