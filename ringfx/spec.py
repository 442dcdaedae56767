"""What one attention computes: the fields of the canonical operator, shared by all rooms."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from ringfx import tiles
from ringfx.tiles import Expr

__all__ = ["AttentionSpec"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """softmax(cap(scale * q @ k^T) + bias, where keep) @ v, over whole sequences.

    With scores s = scale * q k^T, s <- soft_cap * tanh(s / soft_cap) if a cap is given,
    s <- s + bias, s <- -inf where keep is false. ``keep`` and ``bias`` are tile functions
    (see ringfx.tiles) of global positions over captured tensors, the operator's ``inputs``.
    Where the bias hides all keys of a row, a score whose ``slope`` is 0 counts as 0 beside it.
    Lengths are the true global ones: a layout may pad beyond them.
    """

    scale: float
    q_len: int
    kv_len: int
    keep: Expr | None = None
    bias: Expr | None = None
    soft_cap: float | None = None
    dropout: float = 0.0
    sinks: bool = False
    """The last captured tensor holds a logit for each head that joins the softmax alone."""
    fully_masked: Literal["zero", "mean", "absorbed", "nan"] = "zero"
    """What a row with no key kept gives: 0, as SDPA does; the mean of v, where scores were replaced
    by one low number (mean) or where a number was added to them that is so low that they are
    rounded away, though their gradient is not (absorbed: finfo.min masks); NaN, as a plain softmax
    of -inf does."""
    slope: Expr | None = None
    """The derivative of a score by its product where the bias hides all keys of its row: 0 where
    the bias stands for the score (masked_fill), 1/2 where torch.maximum met its equal."""

    @property
    def is_causal(self) -> bool:
        return self.keep == tiles.CAUSAL

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> AttentionSpec:
        fields = json.loads(text)
        for name in ("keep", "bias", "slope"):
            fields[name] = tiles.loads(json.dumps(fields[name]))
        return AttentionSpec(**fields)
