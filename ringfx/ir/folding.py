"""Long lists in few lines: equal layers as one, their collectives as one, names by their stems."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ringfx.ir.plan import LayerPlan
from ringfx.ir.values import Collective, CommKind
from ringfx.units.format import format_bytes, format_ms, index_set

__all__ = ["FoldedLayers", "FoldedMoves", "fold", "fold_moves", "fold_names", "folded_bytes"]


# --- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FoldedLayers:
    """Layers that are equal in all but one number of their module path."""

    name: str
    layers: tuple[LayerPlan, ...]


def fold(layers: Sequence[LayerPlan]) -> tuple[FoldedLayers, ...]:
    """Group equal layers as ``model.layers.{0..31}.self_attn``, in order of first appearance."""
    alike: dict[object, list[LayerPlan]] = {}
    for layer in layers:
        alike.setdefault((_template(layer.name), _appearance(layer)), []).append(layer)
    groups = [group for members in alike.values() for group in _fold_alike(members)]
    position = {id(layer): i for i, layer in enumerate(layers)}
    return tuple(sorted(groups, key=lambda group: position[id(group.layers[0])]))


def _appearance(layer: LayerPlan) -> tuple[object, ...]:
    """All that a row of the table shows, times as they print."""
    site = layer.site
    times = (layer.compute_ms, layer.communication_ms, layer.exposed_ms, layer.total_ms)
    sizes = (site.batch, site.heads, site.kv_heads, site.head_dim, site.v_head_dim)
    return (
        (layer.source, layer.found_by, layer.strategy, layer.reason, layer.axis),
        (layer.mask, site.q_len, site.kv_len, sizes, site.dtype, layer.kernel),
        (bool(site.checkpoint), layer.recomputed, layer.attention_again, layer.offloaded),
        tuple(format_ms(ms) for ms in times),
        format_bytes(layer.saved_bytes),
    )


def _fold_alike(members: Sequence[LayerPlan]) -> Iterator[FoldedLayers]:
    """Members of one template, folded along the last number that varies."""
    for name, places in fold_names([layer.name for layer in members]):
        yield FoldedLayers(name=name, layers=tuple(members[i] for i in places))


# --- names ----------------------------------------------------------------------------------------


def fold_names(names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Names that differ in one number as one, with their positions; other numbers stay apart.

    >>> list(fold_names(["a.0", "a.1", "b"]))
    [('a.{0,1}', [0, 1]), ('b', [2])]
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(names):
        alike.setdefault(_template(name), []).append(i)
    for places in alike.values():
        numbers = [_numbers(names[i]) for i in places]
        varying = [d for d, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
        if not varying:
            yield names[places[0]], places
            continue
        along = varying[-1]
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, row in zip(places, numbers, strict=True):
            rows.setdefault((*row[:along], *row[along + 1 :]), []).append(i)
        for group in rows.values():
            yield _folded_name([names[i] for i in group], along), group


def _folded_name(names: Sequence[str], along: int) -> str:
    indices = sorted({_numbers(name)[along] for name in names})
    words: list[str] = [str(number) for number in _numbers(names[0])]
    words[along] = index_set(indices)
    remaining = iter(words)
    return re.sub(r"\d+", lambda _: next(remaining), names[0])


def _template(name: str) -> tuple[str, ...]:
    """What stands around the numbers of a name."""
    return tuple(re.split(r"\d+", name))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(text) for text in re.findall(r"\d+", name))


def folded_bytes(sizes: Iterable[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Names of equal size that differ in one number as one, the largest sum first: name, bytes of
    each, and how many.

    >>> folded_bytes([("a.0", 4), ("a.1", 4), ("head", 9)])
    [('head', 9, 1), ('a.{0,1}', 4, 2)]
    """
    alike: dict[int, list[str]] = {}
    for name, size in sizes:
        alike.setdefault(size, []).append(name)
    found = [
        (name, size, len(places))
        for size, names in alike.items()
        for name, places in fold_names(names)
    ]
    return sorted(found, key=lambda row: -row[1] * row[2])


# --- collectives ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FoldedMoves:
    """Collectives of one kind, direction and reason, that one line of source or parameters ask
    for."""

    kind: CommKind
    in_backward: bool
    reason: str
    source: str
    moves: tuple[Collective, ...]

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(move.bytes_moved for move in self.moves)

    @property
    def kind_words(self) -> str:
        """Such as ``all_reduce in backward``."""
        return self.kind + (" in backward" if self.in_backward else "")

    @property
    def size_words(self) -> str:
        """Of each, where all are alike."""
        sizes = {move.bytes_moved for move in self.moves}
        if len(self.moves) == 1:
            return format_bytes(self.bytes)
        if len(sizes) == 1:
            return f"{format_bytes(sizes.pop())} each"
        return f"{format_bytes(self.bytes)} in all"

    @property
    def rows(self) -> list[tuple[str, int, int]]:
        """Module path, bytes of each and how many, of messages of equal layers."""
        return folded_bytes((move.name, move.bytes_moved) for move in self.moves)

    @property
    def places(self) -> tuple[str, ...]:
        """Module paths, those of equal layers as one: ``model.layers.{0..31}``."""
        return _stems([move.name for move in self.moves if move.name])


def fold_moves(moves: Sequence[Collective]) -> tuple[FoldedMoves, ...]:
    """Gathers first, since they are what a reader wants to remove, then the most bytes."""
    alike: dict[tuple[CommKind, bool, str, str], list[Collective]] = {}
    for move in moves:
        reason = _MORE.sub("", move.reason)
        alike.setdefault((move.kind, move.in_backward, reason, move.source), []).append(move)
    found = [
        FoldedMoves(
            kind=kind,
            in_backward=in_backward,
            reason=members[0].reason if len(members) == 1 else reason,
            source=source,
            moves=tuple(members),
        )
        for (kind, in_backward, reason, source), members in alike.items()
    ]
    return tuple(sorted(found, key=lambda group: (not group.kind.gathers, -group.bytes)))


_MORE = re.compile(r", with \d+ more")
"""How many values one message carries differs from message to message."""


def _stems(names: Sequence[str]) -> tuple[str, ...]:
    """One name for those that differ in one number; else what stands before it, for all of it.

    >>> _stems(["layers.0.q", "layers.1.q", "layers.1.mlp.k", "head"])
    ('layers.{0,1}', 'head')
    >>> _stems(["layers.0.q", "layers.1.q"])
    ('layers.{0,1}.q',)
    """
    names = list(dict.fromkeys(names))
    folded = [name for name, _ in fold_names(names)]
    if len(folded) <= 1:
        return tuple(folded)
    heads = [match[0] if (match := re.match(r".*?\d+", name)) else name for name in names]
    return tuple(name for name, _ in fold_names(list(dict.fromkeys(heads))))
