"""Atomic axes: a union-find whose members may also be cut in two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["AxisClash", "AxisSpace", "Dim"]

Dim = tuple[int, ...]
"""A dimension: its atomic axes, slowest first; () for a dimension of size 1."""


class AxisClash(Exception):
    """Two dimensions of equal size whose factors do not line up."""


@dataclass
class AxisSpace:
    """All atomic axes of one program.

    An axis may be united with another (``unify``) or cut into a slow and a fast part (``_cut``),
    long after dimensions were made of it; so dimensions are read through ``resolve``.
    """

    _parent: list[int] = field(default_factory=list)
    _size: list[int] = field(default_factory=list)
    _parts: dict[int, tuple[int, int]] = field(default_factory=dict)

    def fresh(self, size: int) -> Dim:
        if size == 1:
            return ()
        self._parent.append(len(self._parent))
        self._size.append(size)
        return (len(self._parent) - 1,)

    def size(self, dim: Iterable[int]) -> int:
        total = 1
        for axis in dim:
            total *= self._size[axis]
        return total

    def resolve(self, dim: Iterable[int]) -> Dim:
        """The dimension's atoms as they stand now."""
        atoms: list[int] = []
        for axis in dim:
            root = self._find(axis)
            if root in self._parts:
                atoms.extend(self.resolve(self._parts[root]))
            else:
                atoms.append(root)
        return tuple(atoms)

    def unify(self, a: Dim, b: Dim) -> None:
        """Make two dimensions one, cutting axes where only that lines them up.

        Raises
        ------
        AxisClash
            When neither of two unequal sizes divides the other.
        """
        left, right = list(self.resolve(a)), list(self.resolve(b))
        while left and right:
            x, y = left[0], right[0]
            if x == y:
                left.pop(0)
                right.pop(0)
                continue
            if self._size[x] == self._size[y]:
                self._parent[y] = x
            elif self._size[x] > self._size[y]:
                self._cut(x, self._size[y])
            else:
                self._cut(y, self._size[x])
            left, right = list(self.resolve(left)), list(self.resolve(right))
        assert left == right == [], f"sizes differ: {a} and {b}"

    def regroup(self, dims: Iterable[Dim], sizes: Iterable[int]) -> tuple[Dim, ...]:
        """The dimensions of a row-major reshape, cutting axes at its borders."""
        dims, sizes = tuple(dims), tuple(sizes)
        if 0 in sizes:
            return self._regroup_nothing(dims, sizes)
        rest = list(self.resolve(axis for dim in dims for axis in dim))
        result: list[Dim] = []
        for size in sizes:
            taken: list[int] = []
            while size > 1:
                axis = rest[0]
                if self._size[axis] > size:
                    self._cut(axis, size)
                    rest = list(self.resolve(rest))
                    continue
                if size % self._size[axis]:
                    self._cut(axis, _common(self._size[axis], size))
                    rest = list(self.resolve(rest))
                    continue
                taken.append(rest.pop(0))
                size //= self._size[axis]
            result.append(tuple(taken))
        # An axis taken early may have been cut later: resolve once more.
        return tuple(self.resolve(dim) for dim in result)

    def _regroup_nothing(self, dims: tuple[Dim, ...], sizes: tuple[int, ...]) -> tuple[Dim, ...]:
        """Of no elements: equal dimensions at both ends stay themselves, the others are new."""
        given = [self.size(dim) for dim in dims]
        shorter = min(len(given), len(sizes))
        first = next((i for i in range(shorter) if given[i] != sizes[i]), shorter)
        last = next(
            (i for i in range(shorter - first) if given[-1 - i] != sizes[-1 - i]), shorter - first
        )
        between = sizes[first : len(sizes) - last]
        return (
            *map(self.resolve, dims[:first]),
            *map(self.fresh, between),
            *map(self.resolve, dims[len(dims) - last :]),
        )

    def ancestors(self) -> dict[int, set[int]]:
        """For each atom that was cut out of a longer axis, the axes that it was cut from."""
        found: dict[int, set[int]] = {}
        for axis, parts in self._parts.items():
            for part in self.resolve(parts):
                found.setdefault(part, set()).add(self._find(axis))
        return found

    def _find(self, axis: int) -> int:
        while self._parent[axis] != axis:
            self._parent[axis] = self._parent[self._parent[axis]]
            axis = self._parent[axis]
        return axis

    def _cut(self, axis: int, slow: int) -> None:
        size = self._size[axis]
        if slow <= 1 or size % slow:  # nothing is cut into none
            raise AxisClash(f"an axis of {size} does not divide into {slow}")
        first, second = self.fresh(slow)[0], self.fresh(size // slow)[0]
        self._parts[axis] = (first, second)


def _common(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
