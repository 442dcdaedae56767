"""What ``ringfx.verify`` found, as a value and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ringfx.errors import SplitDiffers

__all__ = ["FirstDifference", "Narrow", "Tensor", "Verification", "Worst"]

MOST_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor that differs, on the rank where it differs most."""

    name: str
    """``gradient of layers.0.weight``, ``output.logits``, ``loss``, ``buffer ...``."""
    found: float
    """max|split - unsplit| / max|unsplit|; infinite where they cannot be compared."""
    rank: int


@dataclass(frozen=True, kw_only=True)
class Worst:
    """All tensors of one kind."""

    kind: str
    """``loss``, ``output``, ``gradient`` or ``buffer``."""
    count: int
    found: float
    """The largest difference."""
    name: str
    """The tensor that has it."""
    is_rounding: bool
    """It is above the tolerance, and no larger than the unsplit model's own rounding to float32."""


@dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """Where the split model first computes something else."""

    layer: str
    """Path of the module; "" for the model's own code."""
    what: str
    """What of it differs: its output, the gradient of its weight, ..."""
    direction: str
    """``forward`` or ``backward``."""
    rank: int


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """How far a narrow type is from float64: |t - t'| / |t'|, by the 2-norm, for each kind."""

    dtype: str
    unsplit: Mapping[str, float]
    split: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Whether a model that was split over ranks gave what it gives unsplit."""

    model: str
    """Its class."""
    world_size: int
    dtype: str
    """In which both were compared."""
    compiler: str
    tolerance: float
    worst: tuple[Worst, ...]
    different: tuple[Tensor, ...]
    """Empty where all agree."""
    first: FirstDifference | None
    """Where something differs and the layer was found."""
    narrow: Narrow | None
    reduced: tuple[str, ...]
    """What was made smaller, and what was invented."""
    notes: tuple[str, ...]
    strategies: tuple[str, ...]
    """That ran, of each attention."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether outputs, loss and every gradient agree on every rank."""
        return not self.different

    def raise_if_different(self) -> Verification:
        """Itself.

        Raises
        ------
        SplitDiffers
            Something differs; the text is the whole report.
        """
        if not self.ok:
            raise SplitDiffers(str(self))
        return self

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(found: Verification) -> list[str]:
    verb = "agrees with" if found.ok else "DIFFERS from"
    lines = [
        f"{found.model} over {found.world_size} ranks {verb} the unsplit model "
        f"({found.dtype} on the CPU, compiler {found.compiler}, {found.seconds:.0f} s)",
        f"  attention: {_counted(found.strategies)}",
    ]
    if found.first is not None:
        first = found.first
        lines.append(
            f"  first difference, in {first.direction}: {first.layer or 'the model itself'}, "
            f"{first.what} (rank {first.rank})"
        )
    for x in found.different[:MOST_LISTED]:
        lines.append(f"  differs: {x.name}, by {x.found:.1e} (rank {x.rank})")
    if (more := len(found.different) - MOST_LISTED) > 0:
        lines.append(f"  differs: {more} more")
    lines.append(f"  largest relative differences (allowed: {found.tolerance:.0e})")
    lines += [
        f"    {f'{x.count} {x.kind}' + ('s' if x.count > 1 else ''):<16}{x.found:8.1e}  {x.name}"
        + (" (the unsplit model rounds to float32 as much)" if x.is_rounding else "")
        for x in found.worst
    ]
    if found.narrow is not None:
        lines.append(f"  {found.narrow.dtype}, its distance from {found.dtype}")
        for kind, unsplit in found.narrow.unsplit.items():
            split = found.narrow.split.get(kind, float("nan"))
            lines.append(f"    {kind:<16}{unsplit:8.1e} unsplit  {split:8.1e} split")
    lines += [f"  reduced: {text}" for text in found.reduced]
    lines += [f"  note: {text}" for text in found.notes]
    if not found.ok:
        lines.append(
            "Do: not train with this model split. Look at the layer above: at a rule or strategy "
            "of your own there; otherwise report it with this text."
        )
    return lines


def _counted(names: tuple[str, ...]) -> str:
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
