"""What one operator would do with a split token line: run on its part, sum, or need the whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch.fx import Node

from ringfx.passes.axes.call import OpAxes, Share, result_values
from ringfx.passes.place.lines import Carried, Lines, Tangle

__all__ = ["Form", "Split", "Unsplittable", "split_mode"]


class Form(Enum):
    """In which form a value is held or wanted."""

    WHOLE = "whole"
    """Every rank holds all of it, and each rank's gradient is the whole gradient."""
    SHARED = "shared"
    """Every rank holds all of it; each rank's gradient is its part of a sum."""
    SPLIT = "split"
    """Each rank holds its tokens."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How an operator runs on split tokens of one line."""

    operands: tuple[Form, ...]
    partial: bool = False
    """Its result is a partial sum over ranks."""
    identity: bool = False
    """A window that split storage already is: no operation at all."""


@dataclass(frozen=True)
class Unsplittable:
    """Why an operator needs the whole."""

    reason: str


def split_mode(lines: Lines, node: Node, line: int) -> Split | Unsplittable | None:
    """The mode of a call along one line; None if the call does not touch the line."""
    named = lines.axes.ops.get(node)
    if named is None:
        return None
    operands = [lines.carried(n) for n in named.call.operands]
    results = [lines.carried(node, i) for i in range(len(result_values(node)))]
    touched = [c for c in (*operands, *results) if _on(c, line) or c is Tangle.TANGLED]
    if not touched:
        return None
    axes = named.axes
    if named.clash:
        return Unsplittable("its dimensions do not line up with the token axis")
    if any(r is Tangle.TANGLED for r in results):
        return Unsplittable("its result holds the token axis twice or in pieces")
    if axes.regroup:
        return _regroup(operands, results, line)
    if axes.pick is not None and any(
        isinstance(c, Carried) and c.outer * c.inner != 1 for c in operands
    ):
        return Unsplittable("it takes single elements of an axis that holds more than tokens")
    if axes.together and not _whole_lines(lines, axes, operands):
        return Unsplittable("its queries or keys are only a part of a token axis, or one token")
    if axes.windows:
        return _window(lines, node, operands, results, line)
    return _labelled(lines, axes, node, operands, results, line)


def _on(carried: Carried | Tangle | None, line: int) -> bool:
    return isinstance(carried, Carried) and carried.line == line


def _whole_lines(lines: Lines, axes: OpAxes, operands: list[Carried | Tangle | None]) -> bool:
    """Whether an operator that moves tokens itself is given whole lines of one layout.

    It knows the layout and the lengths, but no windows: a window is stored where its line is.
    """
    kinds = set()
    for carried, labels in zip(operands, axes.operands, strict=True):
        if labels is None:
            continue
        if not isinstance(carried, Carried) or not set(labels[carried.dim]) <= axes.together:
            return False
        line = lines.lines[carried.line]
        alone = carried.outer * carried.inner == 1
        if not alone or carried.member != line.members[0]:
            return False
        kinds.add(line.layout.kind)
    return len(kinds) == 1


def _regroup(
    operands: list[Carried | Tangle | None], results: list[Carried | Tangle | None], line: int
) -> Split | Unsplittable:
    if all(_on(c, line) for c in (*operands[:1], *results)):
        rest = (Form.SHARED,) * (len(operands) - 1)
        return Split(operands=(Form.SPLIT, *rest))
    return Unsplittable("it reshapes the token axis into pieces")


def _window(
    lines: Lines,
    node: Node,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | Unsplittable:
    source = operands[0]
    axes = lines.axes.ops[node].axes
    if len(results) == 1 and isinstance(source, Carried) and source.line == line:
        (result,) = results
        start = axes.windows[0].start
        along = f"d{source.dim}" == axes.windows[0].source
        if along and isinstance(result, Carried) and result.line == line:
            if result.member.offset == source.member.offset + start:
                return Split(operands=(Form.SPLIT,), identity=True)
            return Unsplittable(axes.reason)
    return _labelled(lines, axes, node, operands, results, line)


def _labelled(
    lines: Lines,
    axes: OpAxes,
    node: Node,
    operands: list[Carried | Tangle | None],
    results: list[Carried | Tangle | None],
    line: int,
) -> Split | Unsplittable:
    forms: list[Form] = []
    active: set[str] = set()
    for carried, labels in zip(operands, axes.operands, strict=True):
        names = labels[carried.dim] if labels and isinstance(carried, Carried) else ()
        splits = (
            _on(carried, line) and len(names) == 1 and axes.share_of(names[0]) is not Share.WHOLE
        )
        forms.append(Form.SPLIT if splits else Form.SHARED)
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
        names = labels[result.dim]
        local = [n for n in names if axes.share_of(n) is Share.LOCAL]
        if len(local) != len(names):
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
