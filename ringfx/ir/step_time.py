"""The predicted time of a whole step: what runs outside attention, in parts that grow alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ringfx.validation.fields import Count, Gflops, Milliseconds, Power, Rate, SomeText, Text

__all__ = ["AGAIN", "ELEMENTWISE", "OPTIMIZER", "PRODUCTS", "WAITS", "StepPart", "StepTime"]

PRODUCTS = "matrix products"
ELEMENTWISE = "other operators"
OPTIMIZER = "optimizer"
AGAIN = "computed again"
WAITS = "messages that wait for other ranks"


@dataclass(frozen=True, kw_only=True)
class StepPart:
    """Time of one rank that grows alike with the length."""

    cause: SomeText
    forward_ms: Milliseconds
    backward_ms: Milliseconds
    gflops: Gflops = 0.0
    """Operations of one rank, in billions, without what is computed again."""
    tokens: Power
    """The power of the sequence's length that they grow with."""
    is_split: bool
    """Whether each rank does its share, or all."""

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms

    def scaled(self, length: float, ranks: float) -> StepPart:
        """At so many times the length, over so many times the ranks."""
        factor = length**self.tokens / (ranks if self.is_split else 1.0)
        return replace(
            self, forward_ms=self.forward_ms * factor, backward_ms=self.backward_ms * factor,
            gflops=self.gflops * factor,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Outside attention, on one rank. Attention's own time is its layers'."""

    parts: tuple[StepPart, ...]
    tokens: Count
    """Tokens of a step, of all sequences and ranks together."""
    attention_gflops: Gflops = 0.0
    """Operations of attention that one rank's share of the model asks for: of causal attention
    half, of a backward twice a forward's."""
    peak_gflops: Rate | None = None
    """The device's peak in the type of most products."""
    by_block: tuple[tuple[Text, Milliseconds], ...] = ()
    """Milliseconds by block of the model, attention left out."""

    @property
    def total_ms(self) -> float:
        return sum(part.total_ms for part in self.parts)

    @property
    def gflops(self) -> float:
        """Operations of one rank that the model asks for, in billions."""
        return self.attention_gflops + sum(part.gflops for part in self.parts)

    def of(self, cause: str) -> float:
        """Milliseconds of one cause."""
        return sum(part.total_ms for part in self.parts if part.cause == cause)
