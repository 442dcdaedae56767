"""What a family of operators says of itself beyond labels: ``OpAxes.how``.

Each value is read by the split mode of its family (``ringfx.passes.split_modes``). A rule without
one says all there is to say with labels alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "Attend",
    "Concat",
    "Draw",
    "Flip",
    "Halo",
    "How",
    "Lookup",
    "Normalise",
    "Pick",
    "Reduce",
    "Reshape",
    "Reshard",
    "Roll",
    "Scan",
    "SizeArgument",
    "Sum",
]


class How:
    """The base of all families."""


@dataclass(frozen=True, kw_only=True)
class Reshape(How):
    """A row-major reshape of the only operand: results are given by sizes, not by labels."""


@dataclass(frozen=True, kw_only=True)
class SizeArgument(How):
    """The argument ``name`` holds sizes of the result and must be rewritten to local ones."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Sum(How):
    """A sum, partial along its summed labels."""

    fill: Mapping[int, float | int] = field(default_factory=dict)
    """Operand -> the value that padded tokens must hold, so that they add nothing."""
    mean: bool = False
    """The call divides by the number of elements that it sums."""


@dataclass(frozen=True, kw_only=True)
class Pick(How):
    """One element of the summed label: only its owner has it."""

    element: int


@dataclass(frozen=True, kw_only=True)
class Lookup(How):
    """Elements of the first operand are read by number."""

    numbers: Mapping[str, int]
    """Label that is read -> the operand that holds the numbers."""


@dataclass(frozen=True, kw_only=True)
class Concat(How):
    """The operands are pieces of dimension ``dim`` of the result, one after the other."""

    dim: int
    starts: tuple[int, ...]
    """Where in that dimension each operand starts."""


@dataclass(frozen=True, kw_only=True)
class Halo(How):
    """Dimensions along which the call sees a few neighbours."""

    dims: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Roll(How):
    """Dimension ``dim`` is rolled by ``shift`` elements."""

    dim: int
    shift: int


@dataclass(frozen=True, kw_only=True)
class Flip(How):
    """The order of dimensions ``dims`` is reversed."""

    dims: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Scan(How):
    """Element i of dimension ``dim`` is what an associative operation makes of the first i."""

    dim: int


@dataclass(frozen=True, kw_only=True)
class Normalise(How):
    """A softmax, or its logarithm, along dimension ``dim``."""

    dim: int


@dataclass(frozen=True, kw_only=True)
class Reduce(How):
    """A reduction of dimensions ``dims`` that is that of its parts' results."""

    dims: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Draw(How):
    """Random numbers for the whole tensor, by the first operand's shape alone.

    A rank that has a part draws them all and keeps its own (``ringfx.comm.random_draws``).
    """


@dataclass(frozen=True, kw_only=True)
class Attend(How):
    """Attention: the operator itself moves what crosses between ranks."""

    tokens: frozenset[str] = frozenset()
    """Labels that may be sharded at the same time."""
    captured: frozenset[int] = frozenset()
    """Operands whose whole gradient the operator gives to every rank that has all of them."""


@dataclass(frozen=True, kw_only=True)
class Reshard(How):
    """``ringfx.comm.redistribute.reshard``, ``turn``: from one token axis to another."""
