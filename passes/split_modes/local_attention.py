"""Attention along an axis that is not split: each rank attends to its own part of the batch.

Rows of a grid attend along its columns, places of a frame among themselves, tokens of a window with
each other. Where rows, frames or windows are what is split, an attention is complete on the rank
that has them, and nothing is sent. Its batch is then a part of the global one, so that what a mask
reads by the number of the batch entry is read at the number that the rank's own entry has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.tiles import Expr, const
from ringfx.ops.kernels.dropout import seed_of_part
from ringfx.passes.split_modes.local_call import LocalCall
from ringfx.passes.split_modes.mode import CallOnLine, CannotSplit, SplitMode
from ringfx.passes.split_modes.placement import Placement
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["LocalAttention"]

INDICES = ("b", "h")
"""The indices of the dimensions that ranks may share."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """What is read at its own entries only, of which each rank has those of its own."""

    number: int
    dim: int
    is_entry: bool
    """Whether that dimension is the batch as it stands; else it is the batch's tokens alone."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """One rank's entries [outer, held, inner] of a batch [outer, tokens, inner]."""

    entry: Expr
    tokens: TokenDim
    held: int
    index: int
    """Number of the input that says which token each of those that the rank holds is."""
    own: Mapping[int, Own]

    def of(self, expr: Expr) -> Expr:
        """The expression at the number that the rank's entry has among all, but where the rank
        has its own entries of what is read."""
        if expr == self.entry:
            return self._number()
        own = self.own.get(expr[1]) if expr[0] == "at" else None
        if own is None:
            return tiles.map_children(self.of, expr)
        place = self.entry if own.is_entry else _token(self.entry, self.tokens, self.held)
        places = (place if dim == own.dim else self.of(part) for dim, part in enumerate(expr[2:]))
        return ("at", expr[1], *places)

    def _number(self) -> Expr:
        inner, length = self.tokens.inner, self.tokens.member.length
        found: Expr = ("at", self.index, _token(self.entry, self.tokens, self.held))
        if self.tokens.outer > 1:
            rows: Expr = ("floordiv", self.entry, const(self.held * inner))
            found = ("add", ("mul", rows, const(length)), found)
        if inner == 1:
            return found
        return ("add", ("mul", found, const(inner)), ("mod", self.entry, const(inner)))


def _token(entry: Expr, tokens: TokenDim, length: int) -> Expr:
    """Which of ``length`` tokens an entry of [outer, length, inner] is."""
    token = entry if tokens.inner == 1 else ("floordiv", entry, const(tokens.inner))
    return token if tokens.outer == 1 else ("mod", token, const(length))


@dataclass(frozen=True, kw_only=True)
class LocalAttention(SplitMode):
    """Ranks share dimension ``dim`` of queries, keys and values: batch entries or heads."""

    dim: int
    own: tuple[Own, ...] = ()

    @staticmethod
    def match(call: CallOnLine) -> LocalAttention | CannotSplit | None:
        queries, *others = call.operands[:3]
        if not call.on_line(queries) or queries.dim > 1 or queries.member.is_sorted:
            return None
        dim, spec = queries.dim, AttentionSpec.from_json(call.call["spec"])
        sizes = {x[dim] for x in call.call.shapes[:3]}
        alike = all(call.on_line(x) and x == queries for x in (*others, call.results[0]))
        if not alike or len(sizes) > 1:
            return None
        if dim == 1 and (spec.sinks or spec.branches or spec.dropout):
            return CannotSplit("it has something of its own for each head, and heads are split")
        own = tuple(_own(call, spec, queries))
        split = {x.number for x in own}
        read = [
            Placement.SHARDED if i in split else Placement.REPLICATED_PARTIAL_GRAD
            for i in range(len(call.operands) - 3)
        ]
        return LocalAttention(operands=(*(Placement.SHARDED,) * 3, *read), dim=dim, own=own)

    def given(
        self, spec: AttentionSpec, inputs: Sequence[Node], tokens: TokenDim, call: LocalCall
    ) -> tuple[AttentionSpec, list[Node]]:
        """What one rank's attention computes, and what its tile functions read."""
        exprs = (spec.keep, spec.bias, spec.slope)
        last = len(inputs) - spec.sinks - (spec.dropout > 0)  # then sinks, then a seed
        share = _Share(
            entry=(INDICES[self.dim],), tokens=tokens, index=last,
            held=call.layout(tokens).local_length, own={x.number: x for x in self.own},
        )  # fmt: skip
        keep, bias, slope = (None if expr is None else share.of(expr) for expr in exprs)
        read = [*inputs[:last], call.local.index(tokens), *inputs[last:]]
        if last not in tiles.inputs_used(*(e for e in (keep, bias, slope) if e is not None)):
            read.pop(last)
        if spec.dropout:
            where = (tokens.outer, tokens.inner, tokens.member.length)
            read[-1] = call.emit(seed_of_part, read[-1], call.local.index(tokens), *where)
        return replace(spec, keep=keep, bias=bias, slope=slope), read


def _own(call: CallOnLine, spec: AttentionSpec, queries: TokenDim) -> Iterator[Own]:
    """What is read at its own entry of the split dimension only, and is split as that is."""
    entry: Expr = (INDICES[queries.dim],)
    token = _token(entry, queries, queries.member.length)
    places: dict[int, set[Expr]] = {}
    for read in tiles.reads(spec.keep, spec.bias, spec.slope):
        tokens = call.operands[3 + read[1]]
        place = read[2 + tokens.dim] if call.on_line(tokens) else ()
        places.setdefault(read[1], set()).add(place)
    for number, found in places.items():
        tokens = call.operands[3 + number]
        if not call.on_line(tokens):
            continue
        if found == {entry} and replace(tokens, dim=queries.dim) == queries:
            yield Own(number=number, dim=tokens.dim, is_entry=True)
        alone = tokens.outer * tokens.inner == 1 and tokens.member == queries.member
        if found == {token} != {entry} and alone:
            yield Own(number=number, dim=tokens.dim, is_entry=False)
