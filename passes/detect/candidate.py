"""An attention as detection returns it, in whatever form it was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Node

from ringfx.ir.tiles import Expr
from ringfx.ir.values import Declined
from ringfx.passes.axes.arrangement import Arrangement
from ringfx.passes.axes.space import Dim
from ringfx.passes.detect.drops import Drop
from ringfx.passes.detect.names import Factor
from ringfx.passes.detect.products import Product

__all__ = ["Candidate", "Detected", "NearMiss", "Operand", "Region", "decline", "score"]


@dataclass(frozen=True)
class NearMiss:
    """A near miss and why."""

    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Operand:
    """A value of the program and how [batch, heads, tokens, head dim] is made of it."""

    value: Node
    arrangement: Arrangement


@dataclass(frozen=True, eq=False, kw_only=True)
class Region:
    """The calls from the products' operands to the result, as they stand, for the proof."""

    nodes: tuple[Node, ...]
    """In program order."""
    dims: Mapping[Node, tuple[tuple[Dim, ...], ...]]
    """Axes of every value that the calls make or are given."""
    products: tuple[Product, ...]
    """That of the weights with the values last."""
    factors: tuple[tuple[Factor, Factor], ...]
    """Of each product; that of the last which is no weights is ``v``."""
    side: int
    """Which factor of the last product the weights are."""
    drops: tuple[Drop, ...]
    """Where weights become 0 at random."""
    joined: frozenset[int]
    """The axes of keys with a column of logits beside them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """softmax(scores) @ v, with scores an expression of products q_i k_i^T and of other values."""

    node: Node
    """The call whose result the canonical operator gives."""
    found_by: str
    q: tuple[Operand, ...]
    k: tuple[Operand, ...]
    """One pair for each product."""
    v: Operand
    result: Arrangement
    """[batch, heads, query tokens, v head dim] as the call's result has it."""
    sizes: Mapping[int, int]
    """Of every axis."""
    scores: Expr
    """A tile expression with ``("score", i)`` for product i and ``("at", j, ...)`` for values."""
    values: tuple[Node, ...] = ()
    """What the expressions read, by the number in ``("at", j, ...)``."""
    entering: Mapping[Node, tuple[Dim, ...]] = field(default_factory=dict)
    """Axes of the values that the scores read."""
    read: Mapping[Node, Expr] = field(default_factory=dict)
    """How the scores read each value."""
    sinks: Expr | None = None
    """A logit for each head that joins the softmax alone."""
    fully_masked: Literal["zero", "nan"] = "zero"
    """The result for a row of -inf: 0, or NaN as a plain softmax does."""
    dropout: float = 0.0
    region: Region | None = field(default=None, repr=False)
    otherwise: Callable[[], Sequence[Candidate]] = field(default=tuple, repr=False)
    """Other readings, for where this one has no canonical form: one of its products the scores, the
    others biases that are made before."""
    in_windows: bool = False
    """Whether its batch was cut from the tokens, so that each window of them attends alone."""
    over_channels: bool = False
    """Whether its scores are of channels, and the tokens are what they are summed over."""

    def shape(self, operand: Operand) -> tuple[int, ...]:
        """[batch, heads, tokens, head dim] of an operand."""
        return operand.arrangement.shape(self.sizes.__getitem__)

    def length(self, operand: Operand) -> int:
        return self.shape(operand)[2]


@dataclass(frozen=True, eq=False, kw_only=True)
class Detected:
    """Attentions in program order, and look-alikes with the reason why not."""

    candidates: tuple[Candidate, ...]
    declined: tuple[Declined, ...]
    written: tuple[Node, ...] = ()
    """Calls that the user's model makes of the canonical operator itself."""


def score(i: int = 0) -> Expr:
    """Element of product ``i``, as a part of an expression."""
    return ("score", ("const", i))


def decline(node: Node, reason: str) -> Declined:
    return Declined(
        node=node.name,
        name=node.meta.get("ringfx_path", ""),
        source=node.meta.get("ringfx_source", ""),
        reason=reason,
    )
