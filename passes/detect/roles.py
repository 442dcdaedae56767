"""The part that each axis of a region plays: batch, heads, queries, keys, head dims.

Roles come from which operands carry an axis, never from its size or place:

    keys        the axis that the softmax normalises: in k and v, contracted with v
    queries     in q and in neither k nor v
    batch       in k or v, kept in the result; also the heads that k and v have
    groups      heads that k and v lack: they share them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ringfx.ir.tiles import Expr
from ringfx.passes.axes.arrangement import Arrangement
from ringfx.passes.axes.space import Dim
from ringfx.passes.detect.candidate import Operand
from ringfx.passes.detect.names import Factor, Names
from ringfx.passes.detect.program import Program

__all__ = ["Pair", "Refused", "Roles", "assign"]


class Refused(Exception):
    """Why a region is no attention that the canonical operator computes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """The factors of one product, as queries and keys."""

    q: Factor
    k: Factor


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Axes by role, outermost first."""

    batch: Dim
    heads: Dim
    """Heads of k and v, then the groups that share them."""
    kv_heads: Dim
    queries: Dim
    keys: Dim
    contracted: tuple[Dim, ...]
    """The head dim of each product."""
    values: Dim
    """The head dim of v."""
    sizes: Mapping[int, int]
    spelled: Dim = ()
    """The heads in the order of an entry point's own operands."""
    in_windows: bool = False
    """Whether its batch was cut from the tokens, so that each window of them attends alone."""

    def q(self, factor: Factor, dims: Sequence[Dim], i: int) -> Operand:
        wanted = (self.batch, self.heads, self.queries, self.contracted[i])
        return _operand(factor, dims, wanted)

    def k(self, factor: Factor, dims: Sequence[Dim], i: int) -> Operand:
        wanted = (self.batch, self.kv_heads, self.keys, self.contracted[i])
        return _operand(factor, dims, wanted)

    def v(self, factor: Factor, dims: Sequence[Dim]) -> Operand:
        return _operand(factor, dims, (self.batch, self.kv_heads, self.keys, self.values))

    def result(self, dims: Sequence[Dim]) -> Arrangement:
        given = (self.batch, self.heads, self.queries, self.values)
        found = Arrangement(given=given, wanted=tuple(dims))
        if not (found.is_permutation and found.reversed().is_permutation):
            raise Refused("its result has axes other than batch, heads, queries and values")
        return found

    def index(self, dims: Sequence[Dim]) -> tuple[Expr, ...]:
        """The index of a value with these axes as expressions of batch, head, query and key."""
        return tuple(self._index(dim) for dim in dims)

    def _index(self, dim: Dim) -> Expr:
        total: Expr | None = None
        for name, axis, run in self._runs(dim):
            part = self._part(name, axis, run)
            if total is None:
                total = part
            else:
                total = ("add", ("mul", total, ("const", self._size(run))), part)
        return total if total is not None else ("const", 0)

    def _runs(self, dim: Dim) -> list[tuple[str, Dim, Dim]]:
        """The dimension as runs of neighbouring axes of one role."""
        roles = {"b": self.batch, "h": self.heads, "q": self.queries, "k": self.keys}
        runs: list[tuple[str, Dim, Dim]] = []
        for atom in dim:
            name = next((n for n, axis in roles.items() if atom in axis), None)
            if name is None:
                raise Refused("a mask or bias has an axis that the scores do not have")
            axis = roles[name]
            if runs and runs[-1][0] == name and axis.index(runs[-1][2][-1]) + 1 == axis.index(atom):
                runs[-1] = (name, axis, (*runs[-1][2], atom))
            else:
                runs.append((name, axis, (atom,)))
        return runs

    def _part(self, name: str, axis: Dim, run: Dim) -> Expr:
        start = axis.index(run[0])
        after = self._size(axis[start + len(run) :])
        part: Expr = (name,) if after == 1 else ("floordiv", (name,), ("const", after))
        return part if start == 0 else ("mod", part, ("const", self._size(run)))

    def _size(self, dim: Dim) -> int:
        total = 1
        for atom in dim:
            total *= self.sizes[atom]
        return total


def _operand(factor: Factor, dims: Sequence[Dim], wanted: tuple[Dim, ...]) -> Operand:
    arrangement = Arrangement(given=tuple(dims), wanted=wanted)
    if not arrangement.is_permutation:
        raise Refused(
            f"{factor.source.name} has an axis that is not a batch, head, query, key or value axis"
        )
    return Operand(value=factor.source, arrangement=arrangement)


def assign(
    names: Names,
    program: Program,
    pairs: Sequence[Pair],
    v: Factor,
    scores: tuple[Dim, ...],
    keys: Dim,
) -> Roles:
    """The role of every axis.

    Raises
    ------
    Refused
        Where an axis plays no role, or the region is another computation.
    """
    every = _flat(scores)
    q_axes = [_flat(names.resolved(p.q.dims[p.q.source])) for p in pairs]
    k_axes = [_flat(names.resolved(p.k.dims[p.k.source])) for p in pairs]
    v_axes = _flat(names.resolved(v.dims[v.source]))
    shared = {a for axes in (*k_axes, v_axes) for a in axes}
    only_q = [a for a in every if a not in shared and any(a in axes for axes in q_axes)]
    origins = names.origins()
    learned = program.parameter_axes
    queries = _queries(only_q, keys, origins, learned, scores)
    if not queries:
        raise Refused("its queries have no token axis: one query pools all keys")
    kv_batch = tuple(a for a in every if a in shared and a not in keys)
    kv_heads = tuple(a for a in kv_batch if origins.get(a, set()) & learned)
    if not kv_heads and len(kv_batch) > 1:
        kv_heads = kv_batch[-1:]
    batch = tuple(a for a in kv_batch if a not in kv_heads)
    groups = tuple(a for a in every if a not in (*kv_batch, *keys, *queries))
    contracted = tuple(_contracted(q, k, every) for q, k in zip(q_axes, k_axes, strict=True))
    free = tuple(a for a in kv_batch if not origins.get(a, set()) & learned)
    used = {*every, *v_axes, *(a for dim in contracted for a in dim)}
    return Roles(
        batch=batch,
        heads=kv_heads + groups,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        contracted=contracted,
        values=tuple(a for a in v_axes if a not in every),
        sizes={a: names.space.size((a,)) for a in used},
        in_windows=_in_windows(program, origins, free, queries + keys),
    )


def _flat(dims: Iterable[Dim]) -> Dim:
    return tuple(a for dim in dims for a in dim)


def _queries(
    only_q: Sequence[int], keys: Dim, origins: Mapping[int, set[int]], learned: frozenset[int],
    scores: Sequence[Dim],
) -> Dim:  # fmt: skip
    """Of the axes that only q has, the tokens; the others are heads that share k and v.

    In self-attention the tokens are the axis that the keys' tokens are to the whole program, and
    what is one dimension with it: of landmarks, each the mean of a segment, the queries are all
    tokens of the segments. Else whatever is no dimension of a parameter, as heads are; else the
    innermost.
    """
    of_keys = {o for a in keys for o in origins.get(a, ())}
    same = [a for a in only_q if origins.get(a, set()) & of_keys]
    free = [a for a in only_q if not origins.get(a, set()) & learned]
    beside = {a for dim in scores if not set(same).isdisjoint(dim) for a in dim}
    same = [a for a in only_q if a in same or (a in free and a in beside)]
    return tuple(same or free or only_q[-1:])


def _contracted(q: Dim, k: Dim, every: Dim) -> Dim:
    rest = tuple(a for a in q if a not in every)
    if set(rest) != {a for a in k if a not in every} or not rest:
        raise Refused("its queries and keys are not contracted over one head dim")
    return rest


def _in_windows(program: Program, origins: Mapping[int, set[int]], batch: Dim, tokens: Dim) -> bool:
    """Whether the batch holds windows: it is cut from the axis that the tokens are cut from.

    A dimension of the user's own inputs is no such window, even where it is flattened together
    with the tokens in between.
    """
    cut_from = program.axes.space.ancestors()

    def ancestors(axes: Dim) -> set[int]:
        own = {o for a in axes for o in origins.get(a, ())}
        return {x for o in own - program.input_axes for x in cut_from.get(o, ())}

    return bool(ancestors(batch) & ancestors(tokens))
