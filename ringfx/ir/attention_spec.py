"""What one attention computes: the fields of the canonical operator, shared by all rooms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field, PlainValidator

from ringfx.errors import InvalidArgument
from ringfx.ir import tiles
from ringfx.ir.dilation import Branch, KeptRows, describe_branches
from ringfx.ir.tiles import Expr, conjunction
from ringfx.ir.tiles.checked import checked_expr, checked_score_map
from ringfx.validation.fields import STRICT, Finite, Tokens
from ringfx.validation.json_reader import Source, parse_json, validated

__all__ = ["AttentionSpec"]

TileFunction: TypeAlias = Annotated[Expr, PlainValidator(checked_expr)]
"""Read from a file, its form is checked."""
ScoreMap: TypeAlias = Annotated[Expr, PlainValidator(checked_score_map)]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """softmax(cap(scale * q @ k^T) + bias, where keep) @ v, over whole sequences.

    With scores s = scale * q k^T, s <- soft_cap * tanh(s / soft_cap) if a cap is given,
    s <- score_map(s), s <- s + bias, s <- -inf where keep is false. These are tile functions
    (see ringfx.tiles) of global positions over captured tensors, the operator's ``inputs``.
    Where the bias hides all keys of a row, a score whose ``slope`` is 0 counts as 0 beside it.
    Lengths are the true global ones: a layout may pad beyond them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    scale: Finite
    q_len: Tokens
    kv_len: Tokens
    keep: TileFunction | None = None
    bias: TileFunction | None = None
    soft_cap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    score_map: ScoreMap | None = None
    """What is done to each score by itself: a tile function that reads it as ``("score",)``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of weights that are 0; the others are divided by the rest. Which ones follows from
    a seed, the very last captured tensor, and from batch, head and positions."""
    counts_from: tuple[int, int] = (0, 0)
    """The positions of a query and of a key that are the first to dropout."""
    sinks: bool = False
    """The last captured tensor, but for a seed, holds a logit for each head that joins the softmax
    alone."""
    fully_masked: Literal["zero", "mean", "absorbed", "nan"] = "zero"
    """What a row with no key kept gives: 0, as SDPA does; the mean of v, where scores were replaced
    by one low number (mean) or where a number was added to them that is so low that they are
    rounded away, though their gradient is not (absorbed: finfo.min masks); NaN, as a plain softmax
    of -inf does."""
    slope: TileFunction | None = None
    """The derivative of a score by its product where the bias hides all keys of its row: 0 where
    the bias stands for the score (masked_fill), 1/2 where torch.maximum met its equal."""

    branches: tuple[Branch, ...] = ()
    """Dilated attention: every head attends in each of these, merged by their softmaxes'
    denominators (see ``ringfx.ir.dilation``). ``keep`` is causal or nothing then."""

    @property
    def needs_scores(self) -> bool:
        """Whether its tiles need their scores as they are: no fused kernel caps or maps them as it
        does, or drops weights by a key of their own."""
        return self.maps_scores or self.dropout > 0

    @property
    def is_causal(self) -> bool:
        return self.keep == tiles.CAUSAL

    @property
    def functions(self) -> tuple[Expr | None, ...]:
        """The tile functions that read captured tensors."""
        return self.keep, self.bias, self.score_map

    @property
    def maps_scores(self) -> bool:
        """Whether scores are more than scaled products and a bias."""
        return self.soft_cap is not None or self.score_map is not None

    @property
    def words(self) -> str:
        """The mask, bias and dropout as a person says them."""
        found = tiles.describe(self.keep, self.bias, self.score_map)
        if self.branches:
            causal = ", causal" if self.is_causal else ""
            found = f"{describe_branches(self.branches)}{causal}"
        return f"{found}, dropout {self.dropout:g}" if self.dropout else found

    @property
    def density(self) -> float:
        """Share of (query, key) pairs that are computed, 0 to 1; 1 where it depends on data."""
        keeps = [(self.keep, 1.0)]
        if self.branches:
            keeps = [(conjunction(b.segments, self.keep), 1.0 / b.rate**2) for b in self.branches]
        return min(1.0, sum(s * tiles.density(k, self.q_len, self.kv_len) for k, s in keeps))

    @property
    def is_balanced(self) -> bool:
        """Whether equal runs of queries compute about as many pairs as each other."""
        segments = max(self.branches, key=lambda b: b.segment).segments if self.branches else None
        return tiles.is_balanced(conjunction(segments, self.keep), self.q_len, self.kv_len)

    def of_rows(self, rows: KeptRows) -> AttentionSpec:
        """One part of a dilated attention: attention among kept rows, by their numbers."""
        keep = rows.keep(causal=self.is_causal)
        return replace(self, q_len=rows.count, kv_len=rows.count, keep=keep, branches=())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str, sizes: Sequence[int] = ()) -> AttentionSpec:
        """Read what ``to_json`` wrote; ``sizes``: the numbers that ``"$0"``, ``"$1"``, ... in it
        stand for.

        Raises
        ------
        InvalidArgument
            A field is missing or unknown, or has a value that cannot be.
        """
        return _read(text, tuple(sizes))


_SOURCE = Source(
    where="this is not an attention in JSON",
    damaged="this attention is invalid",
    error=InvalidArgument,
    remedy="pass what AttentionSpec.to_json() wrote",
)


@lru_cache(maxsize=512)
def _read(text: str, sizes: tuple[int, ...]) -> AttentionSpec:
    """The operators read theirs on every call."""
    return validated(AttentionSpec, _filled(parse_json(text, _SOURCE), sizes), _SOURCE)


def _filled(value: Any, sizes: tuple[int, ...]) -> Any:
    """The numbers put in the places that are left open for them."""
    if not sizes:
        return value
    if isinstance(value, dict):
        return {key: _filled(part, sizes) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, sizes) for part in value]
    is_open = isinstance(value, str) and value.startswith("$")
    return sizes[int(value[1:])] if is_open else value
