"""What a matrix of numbers says of its row and column, proved by looking at every entry.

A buffer such as ``torch.tril(torch.ones(n, n))`` is a function of two positions that somebody wrote
down. Found here, the function takes the place of the matrix:

    two values      a run of columns in each row, whose ends are positions, lengths or chunks of
                    rows; the same with the first columns kept beside it; the complement of these
    j - i           a table of rows + columns - 1 values, or a slope
    both            a mask beside either

A guess is drawn from a few rows and then compared with all entries, in blocks of bounded size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ringfx.ir.tiles import Expr, K, Q, TileIndex, const, evaluate
from ringfx.passes.exprs.additive import FAR_BELOW
from ringfx.passes.exprs.simplify import simplify

__all__ = ["Formula", "Matrix", "formula_of"]

Tensor = torch.Tensor
BLOCK = 1 << 22
"""Entries looked at in one go."""
LARGEST = 1 << 30
"""Entries of a matrix that is looked at (0.2 s for 2**24 on one core)."""
FIRST, SECOND = Q, K
"""Row and column in a formula."""


@dataclass(frozen=True, kw_only=True)
class Formula:
    """``where(keep, inside, outside)`` of row (``q``) and column (``k``)."""

    keep: Expr | None
    """None: everywhere."""
    inside: bool | int | float | None
    """A number; None: a value for each ``column - row``, to be read from a table."""
    outside: bool | int | float | None = None
    is_slope: bool = False
    """The table's values are ``slope * (row - column)``, the slope its entry left of the middle."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A tensor of [leading, rows, columns], read in blocks of rows."""

    values: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.values.shape[-2])

    @property
    def num_columns(self) -> int:
        return int(self.values.shape[-1])

    def blocks(self) -> Iterator[tuple[int, int]]:
        step = max(1, BLOCK // max(1, self.values.shape[0] * self.num_columns))
        for start in range(0, self.num_rows, step):
            yield start, min(start + step, self.num_rows)

    @cached_property
    def extremes(self) -> tuple[bool | int | float, bool | int | float] | None:
        """Smallest and largest value; None where there is a NaN."""
        ends = []
        for start, stop in self.blocks():
            block = self.values[:, start:stop]
            if block.dtype == torch.bool:
                block = block.to(torch.uint8)
            ends.append(torch.stack(torch.aminmax(block)))
        low, high = torch.stack(ends)[:, 0].min(), torch.stack(ends)[:, 1].max()
        if bool(torch.isnan(low)) or bool(torch.isnan(high)):
            return None
        kind = bool if self.values.dtype == torch.bool else lambda x: x
        return kind(low.item()), kind(high.item())

    def holds_only(self, low: float, high: float) -> bool:
        return all(
            bool(((b == low) | (b == high)).all())
            for b in (self.values[:, start:stop] for start, stop in self.blocks())
        )

    def depends_on_difference(self) -> bool:
        """Whether an entry depends on column - row alone: it equals its upper left neighbour."""
        v = self.values
        return all(
            torch.equal(v[:, max(start, 1) : stop, 1:], v[:, max(start, 1) - 1 : stop - 1, :-1])
            for start, stop in self.blocks()
        )


def formula_of(matrix: Matrix) -> Formula | None:
    """The matrix as a function of its row and column, if it is one that has a name here."""
    ends = matrix.extremes if 0 < matrix.values.numel() <= LARGEST else None
    if ends is None:
        return None
    low, high = ends
    if low == high:
        return Formula(keep=None, inside=low)
    two_valued = matrix.holds_only(low, high)
    if two_valued:
        kept = _kept_where(matrix, lambda block: block == high)
        if kept is not None:
            return Formula(keep=kept, inside=high, outside=low)
    if not matrix.depends_on_difference():
        return None
    masked = low <= FAR_BELOW and not two_valued
    kept = _kept_where(matrix, lambda block: block != low) if masked else None
    outside = None if kept is None else low
    return Formula(keep=kept, inside=None, outside=outside, is_slope=_is_slope(matrix, outside))


def _is_slope(matrix: Matrix, outside: float | None) -> bool:
    """Whether what is kept is exactly a number for each leading index times the distance."""
    v, n, m = matrix.values, matrix.num_rows, matrix.num_columns
    if v.dtype not in (torch.float32, torch.float64) or n < 2:
        return False
    table = torch.cat([v[:, 1:, 0].flip(-1), v[:, 0]], -1)
    slope = table[:, n - 2 : n - 1]
    wanted = slope * torch.arange(n - 1, -m, -1, device=v.device).to(v.dtype)
    masked = torch.zeros_like(table, dtype=torch.bool) if outside is None else table == outside
    return bool(torch.isfinite(slope).all()) and bool(((table == wanted) | masked).all())


# --- masks ------------------------------------------------------------------------------------


def _kept_where(matrix: Matrix, is_kept: Callable[[Tensor], Tensor]) -> Expr | None:
    """Where an entry is kept, as a condition on row and column."""
    values = matrix.values
    if any(
        not torch.equal(is_kept(values[:1, a:b]).expand_as(values[:, a:b]), is_kept(values[:, a:b]))
        for a, b in matrix.blocks()
    ):
        return None
    one = Matrix(values[:1])
    for inverted in (False, True):
        truth = (lambda x: ~is_kept(x)) if inverted else is_kept
        runs = _Runs.of(one, truth)
        for guess in [] if runs is None else runs.guesses():
            if _is_everywhere(one, truth, guess):
                return simplify("not", guess) if inverted else guess
    return None


def _is_everywhere(matrix: Matrix, truth: Callable[[Tensor], Tensor], guess: Expr) -> bool:
    """The proof: every entry."""
    one = torch.zeros(1, dtype=torch.int64, device=matrix.values.device)
    columns = torch.arange(matrix.num_columns, device=one.device)
    for start, stop in matrix.blocks():
        rows = torch.arange(start, stop, device=one.device)
        said = evaluate(guess, TileIndex(b=one, h=one, q=rows, k=columns), ())
        block = truth(matrix.values[0, start:stop])
        if not torch.equal(said.bool().expand(1, 1, *block.shape)[0, 0], block):
            return False
    return True


@dataclass(frozen=True, eq=False, kw_only=True)
class _Runs:
    """The kept columns of each row: [first, after_first), and to the end of the last run."""

    first: Tensor
    after_first: Tensor
    last_start: Tensor
    stop: Tensor
    count: Tensor
    """Runs of a row, at most 2."""
    num_columns: int

    @staticmethod
    def of(matrix: Matrix, truth: Callable[[Tensor], Tensor]) -> _Runs | None:
        parts = []
        for start, stop in matrix.blocks():
            block = truth(matrix.values[0, start:stop])
            edge = torch.zeros_like(block[:, :1])
            begins = block & ~torch.cat([edge, block[:, :-1]], 1)
            count = begins.sum(1)
            if int(count.max()) > 2:
                return None
            ends = block & ~torch.cat([block[:, 1:], edge], 1)
            parts.append(
                (
                    _first_true(begins),
                    _first_true(ends) + 1,
                    _last_true(begins),
                    _last_true(ends) + 1,
                    count,
                )
            )
        columns = [torch.cat(part).cpu() for part in zip(*parts, strict=True)]
        return _Runs(
            first=columns[0], after_first=columns[1], last_start=columns[2], stop=columns[3],
            count=columns[4], num_columns=matrix.num_columns,
        )  # fmt: skip

    def guesses(self) -> Iterator[Expr]:
        some, two = self.count > 0, self.count > 1
        if not bool(some.any()):
            return
        for stop in self._ends(self.stop, some):
            below = _condition("lt", stop)
            if not bool(two.any()):
                for start in self._ends(self.first, some):
                    yield from _by_name(start, stop)
                    yield simplify("and", below, _condition("ge", start))
            else:
                at = int(two.int().argmax())
                head = simplify("lt", SECOND, const(int(self.after_first[at])))
                for start in self._ends(self.last_start, two):
                    yield simplify("and", below, simplify("or", head, _condition("ge", start)))

    def _ends(self, edge: Tensor, rows: Tensor) -> Iterator[Expr]:
        """Functions of the row that are this edge in the given rows."""
        n, m = len(edge), self.num_columns
        places = torch.arange(n)
        for function in _edges(edge[rows], places[rows], m):
            one = torch.zeros(1, dtype=torch.int64)
            index = TileIndex(b=one, h=one, q=places, k=one)
            said = evaluate(function, index, ()).expand(1, 1, n, 1).reshape(n).clamp(0, m)
            if torch.equal(said[rows], edge[rows]):
                yield function


def _by_name(start: Expr, stop: Expr) -> Iterator[Expr]:
    """Runs that have a shorter name: a distance on both sides, a chunk, a chunk up to the row."""
    reach = stop[2][1] - 1 if stop[:2] == ("add", FIRST) else None
    if reach is not None and start == ("sub", FIRST, const(reach)):
        yield simplify("le", ("abs", ("sub", FIRST, SECOND)), const(reach))
    if start[0] == "mul" and start[1] == ("floordiv", FIRST, start[2]):
        chunk = ("eq", start[1], ("floordiv", SECOND, start[2]))
        yield chunk
        yield simplify("and", _condition("lt", stop), chunk)


def _first_true(x: Tensor) -> Tensor:
    return x.to(torch.uint8).argmax(1)


def _last_true(x: Tensor) -> Tensor:
    return x.shape[1] - 1 - _first_true(x.flip(1))


def _edges(edge: Tensor, rows: Tensor, num_columns: int) -> Iterator[Expr]:
    """Functions of the row that may be an edge: a number, the row, its chunk, two of them."""
    ends = sorted({int(edge[0]), int(edge[-1])})
    fixed: list[Expr] = [const(x) for x in ends]
    inside = (edge > 0) & (edge < num_columns)
    moved = (edge - rows)[inside]
    shifts = dict.fromkeys(int(x) for x in (moved[:1].tolist() + moved[-1:].tolist()))
    moving: list[Expr] = [_row_plus(x) for x in shifts]
    chunked = list(_chunks(edge, rows))
    singles = [*fixed, *moving, *chunked]
    yield from singles
    for one, other in itertools.product([*fixed, *chunked], moving):
        yield ("max", one, other)
        yield ("min", one, other)


def _row_plus(distance: int) -> Expr:
    if distance < 0:
        return ("sub", FIRST, const(-distance))
    return simplify("add", FIRST, const(distance))


def _chunks(edge: Tensor, rows: Tensor) -> Iterator[Expr]:
    """``(row // size) * step + start``."""
    changes = torch.nonzero(edge[1:] != edge[:-1]).flatten()
    if not len(changes):
        return
    size = int(rows[changes[0] + 1]) - int(rows[0])
    step = int(edge[changes[0] + 1] - edge[changes[0]])
    if size > 1 and int(rows[0]) == 0:
        chunk = simplify("mul", ("floordiv", FIRST, const(size)), const(step))
        yield simplify("add", chunk, const(int(edge[0])))


def _condition(head: str, edge: Expr) -> Expr:
    if edge[0] in ("max", "min"):
        either = (edge[0] == "max") == (head == "lt")
        parts: Sequence[Expr] = [_condition(head, part) for part in edge[1:]]
        return simplify("or" if either else "and", *parts)
    return simplify(head, SECOND, edge)
