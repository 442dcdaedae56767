"""What one operator would do with a split token line: run on its part, sum, or need the whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import Node

from ringfx.comm.redistribute import relay
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.passes.axes.call import Call, OpAxes, Share, result_values
from ringfx.passes.axes.routing import Route, is_grouped
from ringfx.passes.token_axes.find_token_lines import Carried, Lines, Tangle
from ringfx.passes.token_axes.windows import can_move

__all__ = ["Form", "Lookup", "Reach", "Split", "Turn", "Unsplittable", "split_mode"]


class Form(Enum):
    """In which form a value is held or wanted."""

    WHOLE = "whole"
    """Every rank holds all of it, and each rank's gradient is the whole gradient."""
    SHARED = "shared"
    """Every rank holds all of it; each rank's gradient is its part of a sum."""
    SPLIT = "split"
    """Each rank holds its tokens."""
    OWN = "own"
    """Each rank holds something of its own, such as the number of its rows for each expert."""


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """Elements of the first operand's line that a call picks."""

    by: int | None = None
    """The operand that holds their numbers; None for a range known in advance."""
    start: int = 0
    length: int = 1


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a convolution over a line sees beside each token; see ``halo.convolve_tokens``."""

    lead: int
    frames: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A roll along a line: ``y[e] = x[e + by]``, elements counted round the axis."""

    by: int
    units: int
    """Tokens that have the elements which each run needs from its neighbour."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How an operator runs on split tokens of one line."""

    operands: tuple[Form, ...]
    partial: bool = False
    """Its result is a partial sum over ranks."""
    identity: bool = False
    """A window that split storage already is: no operation at all."""
    pieces: tuple[int, ...] = ()
    """A concatenation along the line: where in the result each operand starts."""
    inverts: bool = False
    """The inverse of this rank's own order of rows."""
    shifts: tuple[int, ...] = ()
    """For each operand how many positions it moves: its element at p + shift is wanted at p."""
    reach: Reach | None = None
    """A convolution over the line."""
    turn: Turn | None = None
    """A roll along the line."""
    looked_up: Lookup | None = None
    """Elements of the line by their number: each from the rank that has it."""


@dataclass(frozen=True)
class Unsplittable:
    """Why an operator needs the whole."""

    reason: str


def split_mode(lines: Lines, node: Node, line: int) -> Split | Unsplittable | None:
    """The mode of a call along one line; None if the call does not touch the line."""
    if node in lines.arrived:
        return Split(operands=()) if _on(lines.carried(node), line) else None
    named = lines.axes.ops.get(node)
    if named is None:
        return None
    operands = [lines.carried(n) for n in named.call.operands]
    results = [lines.carried(node, i) for i in range(len(result_values(node)))]
    touched = [c for c in (*operands, *results) if _on(c, line) or c is Tangle.TANGLED]
    if not touched:
        return None
    axes = named.axes
    if node.target is relay:
        return _relay(operands[0], results[0], line)
    if named.clash:
        return Unsplittable("its dimensions do not line up with the token axis")
    if any(r is Tangle.TANGLED for r in results):
        return Unsplittable("its result holds the token axis twice or in pieces")
    route = next((r for r in lines.routes if node in r.nodes), None)
    if route is not None:
        return _routed(lines, route, named.call, operands, results, line)
    if _sorted_rows((*operands, *results)):
        return _among_sorted(lines, axes, named.call, operands, results, line)
    if axes.regroup:
        return _regroup(operands, results, line)
    if _picks(axes, operands[0] if operands else None, line):
        return _pick(axes, operands[0])
    if axes.together and not _whole_lines(lines, axes, named.call, operands):
        return Unsplittable("its queries or keys are only a part of a token axis, or one token")
    if axes.size_arg is not None and all(labels is None for labels in axes.operands):
        return Split(operands=(Form.OWN,) * len(operands))  # a constant reads no values
    if axes.near and isinstance(operands[0], Carried) and operands[0].dim in axes.near:
        return _convolve(lines, axes, named.call, operands[0], results[0], line)
    if axes.turns and isinstance(operands[0], Carried) and operands[0].dim in axes.turns:
        return _turn(lines, axes, named.call, operands[0])
    if axes.joins is not None and any(_along(r, axes.joins, line) for r in results):
        return _join(lines, axes, operands, results, line)
    looked_up = _looks_up(node, axes, operands, results, line) if axes.lookups else None
    if looked_up is not None:
        return looked_up
    if axes.windows and axes.joins is None:
        return _window(lines, axes, operands, results, line)
    return _labelled(axes, operands, results, line)


def _on(carried: Carried | Tangle | None, line: int) -> bool:
    return isinstance(carried, Carried) and carried.line == line


def _relay(
    source: Carried | Tangle | None, result: Carried | Tangle | None, line: int
) -> Split | Unsplittable:
    """The end of one split and the start of another."""
    if not isinstance(result, Carried):
        return Unsplittable("what follows is not split")
    return Split(operands=(Form.SPLIT if _on(source, line) else Form.WHOLE,))


def _whole_lines(
    lines: Lines, axes: OpAxes, call: Call, operands: list[Carried | Tangle | None]
) -> bool:
    """Whether attention is given lines of one layout, whole or windows that its mask can name."""
    kinds = set()
    for i, (carried, labels) in enumerate(zip(operands, axes.operands, strict=True)):
        if labels is None or i in axes.captured:
            continue
        if not isinstance(carried, Carried) or not set(labels[carried.dim]) <= axes.together:
            return False
        line = lines.lines[carried.line]
        whole = carried.member.length * carried.inner == line.attended(carried.inner)
        if carried.outer != 1 or carried.member.is_sorted:
            return False
        if not whole and not can_move(AttentionSpec.from_json(call["spec"])):
            return False
        kinds.add(line.layout.kind)
    keys = {c.member for c in operands[1:3] if isinstance(c, Carried)}
    return len(kinds) == 1 and len(keys) == 1


def _regroup(
    operands: list[Carried | Tangle | None], results: list[Carried | Tangle | None], line: int
) -> Split | Unsplittable:
    if all(_on(c, line) for c in (*operands[:1], *results)):
        shapes_only = (Form.OWN,) * (len(operands) - 1)
        return Split(operands=(Form.SPLIT, *shapes_only))
    return Unsplittable("it reshapes the token axis into pieces")


def _sorted_rows(values: Iterable[Carried | Tangle | None]) -> bool:
    return any(isinstance(c, Carried) and c.member.is_sorted for c in values)


def _routed(
    lines: Lines,
    route: Route,
    call: Call,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | Unsplittable:
    """A sort of rows, and what looks rows up by its order: each rank among its own."""
    if call.node in route.inverses:
        return Split(operands=(Form.OWN,) * len(operands), inverts=True)
    tangled = any(c is Tangle.TANGLED for c in (*operands, *results))
    if tangled or not all(_on(c, line) or n in route.counts for n, c in _given(call, operands)):
        return Unsplittable("it sorts more than the rows of the tokens")
    forms = tuple(Form.OWN if n in route.counts else Form.SPLIT for n in call.operands)
    return Split(operands=forms)


def _given(
    call: Call, operands: list[Carried | Tangle | None]
) -> Iterable[tuple[Node, Carried | Tangle | None]]:
    return zip(call.operands, operands, strict=True)


def _among_sorted(
    lines: Lines,
    axes: OpAxes,
    call: Call,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | Unsplittable:
    """A call on sorted rows: what treats each alone, and a product by group."""
    counts = {n for r in lines.routes for n in r.counts}
    if is_grouped(call.node) and call.operands[-1] in counts:
        return Split(operands=(Form.SPLIT, Form.SHARED, Form.OWN))
    if axes.draws:
        return Unsplittable("it draws random numbers in the order of all rows")
    mode = (
        _regroup(operands, results, line)
        if axes.regroup
        else _labelled(axes, operands, results, line)
    )
    if isinstance(mode, Split) and mode.partial:
        return Unsplittable("it sums over sorted rows")
    return mode


def _along(carried: Carried | Tangle | None, dim: int, line: int) -> bool:
    """Whether a value carries the line alone in one dimension."""
    return (
        isinstance(carried, Carried)
        and carried.line == line
        and carried.dim == dim
        and carried.outer * carried.inner == 1
    )


def _picks(axes: OpAxes, source: Carried | Tangle | None, line: int) -> bool:
    """Whether the call takes one element of the line."""
    if axes.pick is None or not isinstance(source, Carried) or source.line != line:
        return False
    labels = axes.operands[0]
    assert labels is not None
    return axes.share_of(labels[source.dim][0]) is Share.SUM


def _pick(axes: OpAxes, source: Carried | Tangle | None) -> Split | Unsplittable:
    assert isinstance(source, Carried)
    assert axes.pick is not None
    if source.outer * source.inner != 1:
        return Unsplittable("it takes single elements of an axis that holds more than tokens")
    rest = (Form.SHARED,) * (len(axes.operands) - 1)
    looked_up = Lookup(start=axes.pick)
    return Split(operands=(Form.SPLIT, *rest), partial=True, looked_up=looked_up)


def _elements(node: Node) -> int:
    return sum(v.numel() for v in result_values(node))


def _looks_up(
    node: Node,
    axes: OpAxes,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | None:
    """Elements of the line by number, unless numbers and results follow a line themselves."""
    source, *rest = operands
    few = 2 * _elements(node) <= _elements(node.all_input_nodes[0])
    follow = any(c is not None for c in (*rest, *results))
    if not _on(source, line) or (follow and not few):
        return None
    assert isinstance(source, Carried)
    assert axes.operands[0] is not None
    names = axes.operands[0][source.dim]
    if len(names) != 1 or names[0] not in axes.lookups:
        return None
    if any(v.dtype == torch.bool for v in result_values(node)):
        return None
    return Split(
        operands=(Form.SPLIT, *(Form.SHARED for _ in rest)),
        partial=True,
        looked_up=Lookup(by=axes.lookups[names[0]]),
    )


def _convolve(
    lines: Lines,
    axes: OpAxes,
    call: Call,
    source: Carried,
    result: Carried | Tangle | None,
    line: int,
) -> Split | Unsplittable:
    """Each token's outputs look at the inputs of a few tokens before and after it."""
    at = source.dim - 2
    stride, (left, _) = call["stride"][at], call["pads"][at]
    if (
        not isinstance(result, Carried)
        or (source.line, result.line, result.dim) != (line, line, source.dim)
        or source.outer * result.outer != 1
        or source.inner != stride * result.inner
    ):
        return Unsplittable(axes.reason)
    frames = source.inner
    lead = left - frames * (source.member.offset - result.member.offset)
    seen = call["dilation"][at] * (int(call.shapes[1][source.dim]) - 1)
    last = stride * (result.inner - 1) - lead + seen
    reach = Reach(
        lead=lead,
        frames=frames,
        before=-(-max(lead, 0) // frames),
        after=-(-max(last - frames + 1, 0) // frames),
    )
    if max(reach.before, reach.after) > lines.lines[line].layout.chunk_length:
        return Unsplittable("its kernel reaches further than the neighbouring tokens")
    rest = (Form.SHARED,) * (len(axes.operands) - 1)
    return Split(operands=(Form.SPLIT, *rest), reach=reach)


def _turn(lines: Lines, axes: OpAxes, call: Call, source: Carried) -> Split | Unsplittable:
    """Each run takes a few elements from its neighbour, and the last ones those from the front."""
    size = int(call.shapes[0][source.dim])
    by = -axes.turns[source.dim] % size
    by = by if 2 * by <= size else by - size
    units = -(-abs(by) // source.inner)
    if source.outer != 1 or source.member.is_sorted:
        return Unsplittable(axes.reason)
    if units > lines.lines[source.line].layout.chunk_length:
        return Unsplittable("it shifts the axis further than the neighbouring tokens")
    return Split(operands=(Form.SPLIT,), turn=Turn(by=by, units=units))


def _join(
    lines: Lines,
    axes: OpAxes,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | Unsplittable:
    """A concatenation along the line: pieces that lie on it stay split."""
    (result,) = results
    assert isinstance(result, Carried)
    assert axes.joins is not None
    forms: list[Form] = []
    shifts: list[int] = []
    for piece, start in zip(operands, axes.pieces, strict=True):
        lies = isinstance(piece, Carried) and _along(piece, axes.joins, line)
        shift = piece.member.offset - result.member.offset - start if lies else 0  # type: ignore[union-attr]
        near = lies and abs(shift) <= lines.lines[line].layout.chunk_length
        forms.append(Form.SPLIT if near else Form.SHARED)
        shifts.append(shift if near else 0)
    return Split(operands=tuple(forms), pieces=axes.pieces, shifts=tuple(shifts))


def _window(
    lines: Lines,
    axes: OpAxes,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | Unsplittable:
    """A slice of the line is stored as the line itself, or a few positions further.

    One that is no part of the line is picked.
    """
    source = operands[0]
    window = axes.windows[0]
    if len(results) != 1 or not isinstance(source, Carried) or source.line != line:
        return _labelled(axes, operands, results, line)
    (result,) = results
    if f"d{source.dim}" != window.source:
        return _labelled(axes, operands, results, line)
    alone = source.outer * source.inner == 1
    if isinstance(result, Carried) and result.outer * result.inner != source.outer * source.inner:
        return Unsplittable(axes.reason)  # streams side by side: its tokens are not the source's
    if isinstance(result, Carried) and result.line == line:
        shift = source.member.offset + window.start - result.member.offset
        if shift == 0:
            return Split(operands=(Form.SPLIT,), identity=True)
        if abs(shift) <= lines.lines[line].layout.chunk_length:
            return Split(operands=(Form.SPLIT,), shifts=(shift,), identity=True)
    if alone and (result is None or (isinstance(result, Carried) and result.line == line)):
        chosen = Lookup(start=window.start, length=window.length)
        return Split(operands=(Form.SPLIT,), partial=True, looked_up=chosen)
    return Unsplittable(axes.reason)


def _labelled(
    axes: OpAxes,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | Unsplittable:
    forms: list[Form] = []
    active: set[str] = set()
    for i, (carried, labels) in enumerate(zip(operands, axes.operands, strict=True)):
        captured = i in axes.captured
        if carried is Tangle.TANGLED and labels is not None and not captured:
            return Unsplittable("one of its operands holds the token axis twice or in pieces")
        names = labels[carried.dim] if labels and isinstance(carried, Carried) else ()
        splits = (
            _on(carried, line) and len(names) == 1 and axes.share_of(names[0]) is not Share.WHOLE
        )
        forms.append(Form.SPLIT if splits else Form.WHOLE if captured else Form.SHARED)
        active |= set(names) if splits else set()
    return _with_results(axes, results, forms, active, line)


def _with_results(
    axes: OpAxes,
    results: list[Carried | Tangle | None],
    forms: list[Form],
    active: set[str],
    line: int,
) -> Split | Unsplittable:
    reason = axes.reason or "it needs all tokens"
    made: set[str] = set()
    for result, labels in zip(results, axes.results, strict=True):
        if not isinstance(result, Carried) or result.line != line:
            continue
        # Of a dimension (tokens, copies) only the tokens are split.
        names = [n for n in labels[result.dim] if n in active] or labels[result.dim]
        if any(axes.share_of(n) is not Share.LOCAL for n in names):
            return Unsplittable(reason)
        made |= set(names)
    summed = {n for n in active if axes.share_of(n) is Share.SUM}
    if not active and not made:
        return Unsplittable(reason)
    if summed and made:
        return Unsplittable("it would both sum over tokens and keep them")
    if len(summed) > 1 or (len(active - summed) > 1 and not active <= axes.together):
        return Unsplittable("two of its dimensions are the token axis")
    if not summed and not _keeps(active, made, axes):
        return Unsplittable(reason)
    return Split(operands=tuple(forms), partial=bool(summed))


def _keeps(active: set[str], made: set[str], axes: OpAxes) -> bool:
    """Whether every split operand label lives on in the results (or the operator moves it)."""
    lost = active - made
    return not lost or lost <= axes.together
