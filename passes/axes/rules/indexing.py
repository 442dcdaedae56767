"""Operators that look elements up by index."""

from __future__ import annotations

import torch
from torch.fx import Node

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.views import numbered
from ringfx.torch_compat.operators import OpOverload

__all__ = ["RULES"]

aten = torch.ops.aten


def embedding(call: Call) -> OpAxes:
    indices = tuple((f"i{n}",) if s != 1 else () for n, s in enumerate(call.shape("indices")))
    rows, width = call.shape("weight")
    table: Labels = (("row",) if rows != 1 else (), ("width",) if width != 1 else ())
    return OpAxes(
        operands=(table, indices), results=((*indices, table[1]),),
        share=shares(needs_all=["row"]), reason="it looks rows up",
    )  # fmt: skip


def index_select(call: Call) -> OpAxes:
    labels = numbered(call.shapes[0])
    at = call.dim("dim", len(labels))
    picked: Labels = (("picked",) if call.result_shape[at] != 1 else (),)
    out = (*labels[:at], *picked, *labels[at + 1 :])
    return OpAxes(
        operands=(labels, picked), results=(out,), share=shares(needs_all=[f"d{at}"]),
        how=how.Lookup(numbers={f"d{at}": 1}), reason="it looks elements up along the axis",
    )  # fmt: skip


def index(call: Call) -> OpAxes:
    """Advanced indexing: indexed dimensions need all elements, the others are independent."""
    shape, given = call.shapes[0], list(call["indices"])
    given += [None] * (len(shape) - len(given))
    tensors = [i for i in given if isinstance(i, Node)]
    at = [d for d, i in enumerate(given) if isinstance(i, Node)]
    if any(i.meta["val"].dtype == torch.bool for i in tensors):
        return _opaque(call, "it selects by a boolean mask: the result's size depends on the data")
    shapes = [i.meta["val"].shape for i in tensors]
    picked_shape = torch.broadcast_shapes(*shapes)
    picked = tuple((f"i{n}",) if s != 1 else () for n, s in enumerate(picked_shape))
    labels = numbered(shape)
    adjacent = at == list(range(at[0], at[-1] + 1))
    rest = [labels[d] for d in range(len(shape)) if d not in at]
    first = at[0] if adjacent else 0
    out = (*rest[:first], *picked, *rest[first:])
    operand_labels = [
        tuple(
            (f"i{len(picked_shape) - len(s) + n}",) if size != 1 else () for n, size in enumerate(s)
        )
        for s in shapes
    ]
    return OpAxes(
        operands=(labels, *operand_labels),
        results=(out,),
        share=shares(needs_all=[f"d{d}" for d in at]),
        how=how.Lookup(numbers={f"d{d}": 1 + i for i, d in enumerate(at)}),
        reason="it looks elements up along the axis",
    )


def gather(call: Call) -> OpAxes:
    """torch.gather: other dimensions stay local where their sizes agree."""
    shape, where = call.shape("self"), call.shape("index")
    at = call.dim("dim", len(shape))
    labels = list(numbered(shape))
    picked = list(numbered(where))
    needed = [f"d{at}"]
    for d in range(len(shape)):
        if d == at or where[d] != shape[d]:
            picked[d] = (f"p{d}",) if where[d] != 1 else ()
            needed += [f"d{d}"] if d != at else []
            needed += [f"p{d}"] if d != at else []
    operands = (tuple(labels), tuple(picked))
    ordered = call.position("self") < call.position("index")
    return OpAxes(
        operands=operands if ordered else operands[::-1],
        results=(tuple(picked),), share=shares(needs_all=needed),
        how=how.Lookup(numbers={f"d{at}": 1}) if ordered else None,
        reason="it looks elements up along the axis",
    )  # fmt: skip


def take_along_dim(call: Call) -> OpAxes:
    """torch.take_along_dim: other dimensions broadcast and stay local."""
    if call.get("dim") is None:
        return _along_all(call)
    at = call.dim("dim", len(call.shape("self")))
    labels, picked = list(numbered(call.shape("self"))), list(numbered(call.shape("indices")))
    picked[at] = ("picked",) if picked[at] else ()
    out = [mine or other for mine, other in zip(labels, picked, strict=True)]
    out[at] = picked[at]
    operands = (tuple(labels), tuple(picked))
    ordered = call.position("self") < call.position("indices")
    return OpAxes(
        operands=operands if ordered else operands[::-1],
        results=(tuple(out),), share=shares(needs_all=[f"d{at}"]),
        how=how.Lookup(numbers={f"d{at}": 1}) if ordered else None,
        reason="it looks elements up along the axis",
    )  # fmt: skip


def _along_all(call: Call) -> OpAxes:
    """Elements of a flattened tensor, by flattened numbers."""
    labels, where = numbered(call.shape("self")), call.shape("indices")
    if len(where) != 1:
        return _opaque(call, "it looks elements up in a flattened tensor")
    picked: Labels = (("picked",) if where[0] != 1 else (),)
    given = {call.position("self"): labels, call.position("indices"): picked}
    return OpAxes(
        operands=(given[0], given[1]), results=(picked,),
        share=shares(needs_all=[x for dim in labels for x in dim]),
        reason="it looks elements up in the flattened tensor",
    )  # fmt: skip


def index_put(call: Call) -> OpAxes:
    """Writes at indices: indexed dimensions need all elements, and are new axes in the result."""
    axes = index(call)
    given = list(call["indices"])
    labels = numbered(call.shapes[0])
    if any(i is not None and i.meta["val"].dtype == torch.bool for i in given):
        return axes
    at = [d for d, i in enumerate(given) if i is not None]
    out = tuple((f"put{d}",) if d in at and labels[d] else label for d, label in enumerate(labels))
    read, value = axes.results[0], call.shape("values")
    aligned = read[len(read) - len(value) :]
    written = tuple(x if s != 1 else () for x, s in zip(aligned, value, strict=True))
    return OpAxes(
        operands=(labels, *axes.operands[1 : 1 + len(at)], written),
        results=(out,),
        share=shares(needs_all=[f"{prefix}{d}" for d in at for prefix in ("d", "put")]),
        reason="it writes at indices along the axis",
    )


def index_rows(call: Call) -> OpAxes:
    """Adds, copies or fills rows at indices of a dimension, which needs all elements."""
    labels = numbered(call.shape("self"))
    at = call.dim("dim", len(labels))
    rows: Labels = (("rows",) if call.shape("index")[0] != 1 else (),)
    given = {"self": labels, "index": rows, "source": (*labels[:at], *rows, *labels[at + 1 :])}
    by_place = {call.position(n): x for n, x in given.items() if isinstance(call.get(n), Node)}
    is_sum = _adds_to_zeros(call) and bool(rows[0])
    return OpAxes(
        operands=tuple(by_place.get(i, ()) for i in range(len(call.operands))),
        results=(labels,),
        share=shares(needs_all=[f"d{at}"], sum=["rows"])
        if is_sum
        else shares(needs_all=[f"d{at}", "rows"]),
        how=how.Sum(fill={call.position("source"): 0}) if is_sum else None,
        reason="it writes rows at indices along the axis",
    )


def _adds_to_zeros(call: Call) -> bool:
    """Whether what is written is added to zeros: each rank adds its own."""
    zeros = call.operands[0].target
    return call.node.target in ADDING and zeros in ZEROS


ADDING = frozenset({aten.index_add.default, aten.scatter_add.default})
ZEROS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})


def scatter(call: Call) -> OpAxes:
    """torch.scatter and its kin: other dimensions stay local where all sizes agree."""
    shapes = call.shapes
    at = call.dim("dim", len(shapes[0]))
    alike = [d != at and len({s[d] for s in shapes}) == 1 for d in range(len(shapes[0]))]
    is_sum = _adds_to_zeros(call) and shapes[1][at] == shapes[2][at] != 1

    def label(n: int, d: int) -> str:
        if alike[d] or n == 0:
            return f"d{d}"
        return "rows" if is_sum and d == at else f"{n}.{d}"

    operands = tuple(
        tuple((label(n, d),) if size != 1 else () for d, size in enumerate(shape))
        for n, shape in enumerate(shapes)
    )
    every = {x for dims in operands for dim in dims for x in dim}
    local = {f"d{d}" for d, same in enumerate(alike) if same}
    return OpAxes(
        operands=operands, results=(operands[0],),
        share=shares(needs_all=every - local - {"rows"}, sum=["rows"] if is_sum else []),
        how=how.Sum(fill={2: 0}) if is_sum else None,
        reason="it writes at indices along the axis",
    )  # fmt: skip


def one_hot(call: Call) -> OpAxes:
    labels = numbered(call.shapes[0])
    return OpAxes(
        operands=(labels,), results=((*labels, ("class",)),), share=shares(needs_all=["class"])
    )


def slice_scatter(call: Call) -> OpAxes:
    """x with a slice of it replaced: other dimensions stay local."""
    labels = numbered(call.shape("self"))
    at = call.dim("dim", len(labels))
    placed = list(numbered(call.shape("src")))
    placed[at] = ("placed",) if placed[at] else ()
    return OpAxes(
        operands=(labels, tuple(placed)), results=(labels,),
        share=shares(needs_all=[f"d{at}", "placed"]),
        reason="it writes into a part of the axis",
    )  # fmt: skip


def written_by_index(call: Call) -> OpAxes:
    return _opaque(call, "it writes elements by index")


def rank_among(values: str, borders: str) -> AxisRule:
    """bucketize and searchsorted: each value looks at all borders of its row."""

    def rule(call: Call) -> OpAxes:
        if len(call.shape(borders)) != 1:
            return _opaque(call, "it looks values up in rows of borders")
        labels = numbered(call.shape(values))
        given: dict[int, Labels] = {
            call.position(values): labels,
            call.position(borders): (("border",),) if call.shape(borders)[0] != 1 else ((),),
        }
        return OpAxes(
            operands=tuple(given.get(i) for i in range(len(call.operands))),
            results=(labels,),
            share=shares(needs_all=["border"]),
        )

    return rule


def _opaque(call: Call, reason: str) -> OpAxes:
    operands = tuple(
        tuple((f"o{n}.{i}",) if s != 1 else () for i, s in enumerate(shape))
        for n, shape in enumerate(call.shapes)
    )
    results = tuple(
        tuple((f"r{n}.{i}",) if s != 1 else () for i, s in enumerate(shape))
        for n, shape in enumerate(call.result_shapes)
    )
    every = [x for dims in (*operands, *results) for dim in dims for x in dim]
    return OpAxes(operands=operands, results=results, share=shares(needs_all=every), reason=reason)


RULES: dict[OpOverload, AxisRule] = {
    aten.embedding.default: embedding,
    aten.index_select.default: index_select,
    aten.index.Tensor: index,
    aten.gather.default: gather,
    aten.diagonal.default: lambda call: _opaque(call, "it takes a diagonal"),
    aten.take_along_dim.default: take_along_dim,
    aten.one_hot.default: one_hot,
    aten.bucketize.Tensor: rank_among("self", "boundaries"),
    aten.searchsorted.Tensor: rank_among("self", "sorted_sequence"),
    aten.slice_scatter.default: slice_scatter,
    **dict.fromkeys(
        (
            aten.masked_scatter.default, aten.diagonal_scatter.default, aten.put.default,
        ),
        written_by_index,
    ),
    **dict.fromkeys(
        (
            aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.scatter.reduce,
            aten.scatter_reduce.two,
        ),
        scatter,
    ),
    aten.index_put.default: index_put,
    **dict.fromkeys(
        (
            aten.index_add.default, aten.index_copy.default,
            aten.index_fill.int_Scalar, aten.index_fill.int_Tensor,
        ),
        index_rows,
    ),
}  # fmt: skip
