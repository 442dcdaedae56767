"""What every rank computes whole though it is of tokens, and which operator needs it so.

A gather is announced where it happens. This is what no message shows: values that each rank
computes whole from whole inputs, because an operator after them needs all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from ringfx.comm.redistribute import reshard
from ringfx.comm.turn import turn
from ringfx.ir.folding import fold_names
from ringfx.ir.note import Note, NoteKind
from ringfx.ir.values import Captured
from ringfx.ops import attention
from ringfx.passes.axes.call import AxisSharing, result_values
from ringfx.passes.axes.propagate import NamedOp
from ringfx.passes.axes.rules.views import RULES as VIEWS
from ringfx.passes.capture.origin import target_name
from ringfx.passes.place import PlacementMap
from ringfx.passes.place.min_cut import DEARER
from ringfx.passes.split_modes import Placement, SplitMode, split_mode
from ringfx.passes.token_axes import TokenDim
from ringfx.units.format import format_bytes

__all__ = ["computed", "notes_of_whole"]

TELLING = 0.25
"""What one cause has computed whole is told if it is so much of an ordinary value that is split:
half of all bytes that are split are in values as large as that, or larger. Masks, positions, rotary
tables and counts are less."""
MUCH = 0.25
"""What has no token axis is told if it is so much of all that the program computes."""
PART = 2**20
"""What a part of a model computes whole, before or after a graph break, is told from so many bytes
on."""
SHOWN = 3
"""Places that a note names."""
NEEDS_ALL = "it needs all tokens"
WHOLE = frozenset({Placement.REPLICATED, Placement.REPLICATED_PARTIAL_GRAD})


@dataclass(frozen=True, eq=False, kw_only=True)
class Computed:
    """A result of a call that depends on more than parameters."""

    node: Node
    index: int
    bytes: int
    is_split: bool
    is_float: bool


@dataclass(frozen=True, kw_only=True)
class _Cause:
    """An operator for which values are computed whole, and why it is."""

    node: Node
    why: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for equal layers."""
        return self.node.meta.get("ringfx_source", ""), target_name(self.node.target), self.why


def computed(captured: Captured, placement: PlacementMap) -> Iterator[Computed]:
    """In program order."""
    nodes = captured.graph_module.graph.nodes
    places = (n for n in nodes if n.op == "placeholder")
    given = {n for number, n in enumerate(places) if number not in captured.held}
    for node in nodes:
        if node.op != "call_function" or given.isdisjoint(node.all_input_nodes):
            continue
        given.add(node)
        if node in placement.lines.axes.ops:
            for i, value in enumerate(result_values(node)):
                yield Computed(
                    node=node, index=i, bytes=value.numel() * value.element_size(),
                    is_split=placement.is_sharded(node, i),
                    is_float=value.is_floating_point() or value.is_complex(),
                )  # fmt: skip


def notes_of_whole(
    captured: Captured, placement: PlacementMap, world_size: int
) -> tuple[Note, ...]:
    """One for each operator of the source that needs all tokens, with what is computed for it; and
    one for what has no tokens, where that is much."""
    if world_size == 1:
        return ()
    values = [x for x in computed(captured, placement) if x.is_float and not _is_view(x.node)]
    least = TELLING * _ordinary([x.bytes for x in values if x.is_split])
    total = sum(x.bytes for x in values)
    if not least:
        is_part = captured.graph_break is not None or captured.uncompiled_caller is not None
        # Of a whole model it is said in other words.
        return (_note_of_part(values, total, world_size),) if is_part and total >= PART else ()
    tokens = _Tokens(placement)
    causes = _causes(captured, placement, tokens)
    told = {attention, *(n.target for n in placement.lines.axes.missing)}
    by_cause: dict[_Cause, list[Computed]] = {}
    others: list[Computed] = []
    for x in values:
        if x.is_split or x.node in placement.modes:
            continue
        cause = causes[x.node]
        if not tokens.has(x.node, x.index):
            others.append(x)
        elif cause.node.target not in told:  # elsewhere
            by_cause.setdefault(cause, []).append(x)
    alike: dict[tuple[str, str, str], dict[_Cause, list[Computed]]] = {}
    for cause, found in by_cause.items():
        alike.setdefault(cause.key, {})[cause] = found
    notes = [_note(found, world_size) for found in alike.values() if _bytes(found) >= least]
    if not placement.lines.inputs and sum(x.bytes for x in others) >= MUCH * total:
        notes.append(_note_of_others(others, total, world_size))
    return tuple(notes)


def _is_view(node: Node) -> bool:
    return node.target in VIEWS or node.target is reshard


def _ordinary(sizes: Collection[int]) -> int:
    """The size that half of all bytes are in values of, or of larger ones."""
    left = sum(sizes) / 2
    for size in sorted(sizes, reverse=True):
        left -= size
        if left <= 0:
            return size
    return 0


class _Tokens:
    """Which values are of tokens, those too whose tokens no line has any more."""

    def __init__(self, placement: PlacementMap) -> None:
        self.lines, self.axes = placement.lines, placement.lines.axes
        self.ended: set[int] = set()
        """Axes where a reshard ended one of a line, or that an operator made of one."""
        shortest = min((line.length for line in self.lines.lines), default=0)
        for node, named in self.axes.ops.items():
            if node.target is reshard:
                self.ended |= set(self.axes.dims(node)[node.args[1]]) if node.args[2:] else set()  # type: ignore[index]
            elif any(self.has(n, 0) for n in named.call.operands):
                self._follow(named, shortest // 2)

    def _follow(self, named: NamedOp, least: int) -> None:
        node = named.call.node
        results = range(len(result_values(node)))
        if any(self.has(node, i) for i in results):
            return
        given = {x for n in named.call.operands for dim in self.axes.dims(n) for x in dim}
        made = {x for i in results for dim in self.axes.dims(node, i) for x in dim} - given
        self.ended |= {x for x in made if self.axes.space.size((x,)) > least}

    def why_all(self, node: Node) -> str | None:
        """Why a call needs all tokens of something that it reads; None if it does not."""
        named = self.axes.ops.get(node)
        if named is None:
            return None
        for operand, labels in zip(named.call.operands, named.axes.operands, strict=True):
            for dim, names in zip(self._dims(operand), labels or (), strict=False):
                shares = {named.axes.share_of(x) for x in names}
                if dim and AxisSharing.NEEDS_ALL in shares:
                    return named.axes.reason or NEEDS_ALL
        return None

    def _dims(self, node: Node) -> list[bool]:
        """Which dimensions hold tokens."""
        place = self.lines.token_dim(node)
        return [
            (isinstance(place, TokenDim) and d == place.dim) or not self.ended.isdisjoint(dim)
            for d, dim in enumerate(self.axes.dims(node))
        ]

    def has(self, node: Node, index: int) -> bool:
        if node not in self.axes.values:
            return False
        if self.lines.token_dim(node, index) is not None:
            return True
        return any(not self.ended.isdisjoint(dim) for dim in self.axes.dims(node, index))


def _causes(captured: Captured, placement: PlacementMap, tokens: _Tokens) -> Mapping[Node, _Cause]:
    """For each value that no rank has a part of the operator for which it is so: the next one after
    it that needs all tokens, or else one before it."""
    whole = [
        n
        for n in captured.graph_module.graph.nodes
        if n.op == "call_function" and not placement.is_sharded(n) and n not in placement.modes
    ]
    found: dict[Node, _Cause] = {}
    for node in reversed(whole):
        why = placement.reasons.get(node, DEARER)
        if _may_be_split(tokens, node):
            why = DEARER  # whatever another line, or its rule, says of it
        elif why == DEARER:
            why = tokens.why_all(node) or DEARER
        reader = next((n for n in node.users if _reads_all(placement, n, node)), None)
        if node.target in (reshard, turn):
            found[node] = _Cause(node=_reader_of(node), why=NEEDS_ALL)
        elif why == DEARER and reader is not None and tokens.has(node, 0):
            found[node] = _Cause(node=reader, why=tokens.why_all(reader) or NEEDS_ALL)
        elif why != DEARER:
            found[node] = _Cause(node=node, why=why)
        elif after := [found[n] for n in node.users if n in found]:
            found[node] = next((x for x in after if x.node in node.users), after[0])
    for node in whole:
        before = (found[n] for n in node.all_input_nodes if n in found)
        own = _Cause(node=node, why=DEARER)
        found.setdefault(node, next((x for x in before if x.why != DEARER), own))
    return found


def _may_be_split(tokens: _Tokens, node: Node) -> bool:
    """Whether a call could run on a rank's part of all the tokens that it reads."""
    named = tokens.axes.ops.get(node)
    for line in tokens.lines.lines if named else ():
        mode = split_mode(tokens.lines, node, line.index)
        if isinstance(mode, SplitMode):
            pairs = zip(named.call.operands, mode.operands, strict=False)  # type: ignore[union-attr]
            return not any(p in WHOLE and tokens.has(n, 0) for n, p in pairs)
    return False


def _reader_of(value: Node) -> Node:
    """The user's call behind what changes a placement."""
    while value.target in (reshard, turn) and value.users:
        value = next(iter(value.users))
    return value


def _reads_all(placement: PlacementMap, reader: Node, value: Node) -> bool:
    """Whether a call that is split has all of a value on every rank."""
    mode, named = placement.modes.get(reader), placement.lines.axes.ops.get(reader)
    if mode is None or named is None:
        return False
    places = {p for n, p in zip(named.call.operands, mode.operands, strict=False) if n is value}
    return not places.isdisjoint(WHOLE)


# --- in words -------------------------------------------------------------------------------------


def _note(found: Mapping[_Cause, Sequence[Computed]], world_size: int) -> Note:
    """``layers.{0..3}.pick (model.py:33), aten.gather.default: it needs all tokens; so each of the
    2 ranks computes 12.0 KiB whole: aten.linear.default (model.py:31) and 2 more``."""
    source, target, why = next(iter(found)).key
    names = [cause.node.meta.get("ringfx_path", "") for cause in found]
    name = ", ".join(text for text, _ in fold_names(names)) or "top level"
    values = [x for some in found.values() for x in some]
    return Note(
        text=f"{name} ({source}), {target}: {why}; so each of the {world_size} ranks computes "
        f"{format_bytes(_bytes(found))} whole: {_largest(values)}",
        kind=NoteKind.NOTE if why == DEARER else NoteKind.WHOLE,
    )


def _note_of_others(values: Sequence[Computed], total: int, world_size: int) -> Note:
    size = format_bytes(sum(x.bytes for x in values))
    return Note(
        text=f"of {format_bytes(total)} that the program computes each of the {world_size} ranks "
        f"computes {size} whole, which have no token axis: {_largest(values)}",
        kind=NoteKind.WHOLE,
    )


def _note_of_part(values: Sequence[Computed], total: int, world_size: int) -> Note:
    return Note(
        text="this part of the model (between graph breaks) has neither attention nor a value that "
        f"comes split, so each of the {world_size} ranks computes {format_bytes(total)} whole: "
        f"{_largest(values)}",
        kind=NoteKind.WHOLE,
    )


def _bytes(found: Mapping[_Cause, Sequence[Computed]]) -> int:
    return sum(x.bytes for some in found.values() for x in some)


def _largest(values: Sequence[Computed]) -> str:
    """The calls that make most of them."""
    sizes: dict[str, int] = {}
    for x in values:
        text = f"{target_name(x.node.target)} ({x.node.meta.get('ringfx_source', '')})"
        sizes[text] = sizes.get(text, 0) + x.bytes
    order = sorted(sizes, key=lambda text: -sizes[text])
    more = len(order) - SHOWN
    return ", ".join(order[:SHOWN]) + (f" and {more} more" if more > 0 else "")
