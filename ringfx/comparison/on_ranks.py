"""What each rank does for a comparison."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ringfx.api import optimize
from ringfx.comparison.agreement import (
    TOLERANCE,
    Results,
    disagreements,
    excused,
    none_for_zeros,
)
from ringfx.comparison.locate import Located, Values, locate
from ringfx.comparison.points import Recorded
from ringfx.comparison.results import GRADIENT_OF, Loss, cast, distances, one_step
from ringfx.compile.observed import observing
from ringfx.errors import InvalidArgument

__all__ = ["Found", "Handed", "Task", "alone", "check", "find", "handed"]

PLAIN = {
    "compiler": "eager", "chunks": "none", "recompute": "none", "offload": "none", "dynamic": False,
}  # fmt: skip
"""Options under which each value of the model is a value of the program."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """One comparison, as the ranks get it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]
    loss: Loss | None
    trains: bool
    """Whether gradients are enabled."""
    dtype: str
    narrow: str | None
    """A type that the split model runs in too."""
    stock: Results
    """Of the unsplit model."""
    exact: Results | None
    """Of the unsplit model without its own roundings to float32, where it runs so."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One rank's differences."""

    differences: Mapping[str, float]
    wrong: tuple[str, ...]
    """The tensors whose differences are not rounding."""
    narrow: Mapping[str, float]
    """By kind: how far the narrow type is from exact."""
    strategies: tuple[str, ...]
    drops: bool = False
    """Whether an attention drops weights, by numbers that the unsplit model does not draw."""


_HANDED: dict[int, Any] = {}
"""For ranks that are forked: what they need is there."""
_KEYS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A value on its way to the ranks."""

    key: int
    path: Path | None = None

    def get(self) -> Any:
        """On a rank."""
        if self.path is None:
            return _HANDED[self.key]
        return torch.load(self.path, weights_only=False, mmap=True)


@contextmanager
def handed(value: Any, folder: Path | None) -> Iterator[Handed]:
    """Something for ranks that are forked inside, or (with a folder) in a file.

    Raises
    ------
    InvalidArgument
        It cannot be pickled, so it cannot travel in a file.
    """
    key = next(_KEYS)
    if folder is None:
        _HANDED[key] = value
        try:
            yield Handed(key=key)
        finally:
            del _HANDED[key]
        return
    path = folder / f"{key}.pt"
    try:
        torch.save(value, path)
    except Exception as error:  # whatever objects of the user's say when they are pickled
        raise InvalidArgument(
            "verify: the model, its arguments or options cannot be sent to the ranks: "
            f"{type(error).__name__}: {error}. Do: define classes and functions that they hold at "
            "the top of a module; or run `ringfx verify` on a machine without an accelerator, or "
            "with CUDA_VISIBLE_DEVICES= set, where ranks inherit everything."
        ) from error
    yield Handed(key=key, path=path)


def check(given: Handed) -> Found:
    """Run the model split, and compare with what the unsplit model gave."""
    task: Task = given.get()
    ours, model = _split(task, getattr(torch, task.dtype), task.options)
    differences, wrong = _compared(ours, task)
    narrow: Mapping[str, float] = {}
    if task.narrow is not None:
        found, _ = _split(task, getattr(torch, task.narrow), task.options)
        narrow = distances(found, task.exact or task.stock)
    layers = getattr(model, "plan").layers  # noqa: B009
    return Found(
        differences=differences, wrong=wrong, narrow=narrow,
        strategies=tuple(layer.strategy for layer in layers),
        drops=any(layer.site.spec.dropout > 0 for layer in layers),
    )  # fmt: skip


def alone(given: Handed) -> Results:
    """What the model gives on one rank, whose dropout is that of every split."""
    task: Task = given.get()
    return _split(task, getattr(torch, task.dtype), task.options)[0]


def find(given: Handed, recorded: Handed, tolerance: float) -> tuple[Found, Located | None]:
    """Run it again, uncompiled, and compare the values within it."""
    task: Task = given.get()
    points: Recorded = recorded.get()
    values = Values()
    with observing(values):
        ours, _ = _split(task, getattr(torch, task.dtype), {**task.options, **PLAIN})
        # Also what is computed when an output is touched has run by now.
    differences, wrong = _compared(ours, task)
    found = Found(differences=differences, wrong=wrong, narrow={}, strategies=())
    parameters = {x.removeprefix(GRADIENT_OF) for x in wrong if x.startswith(GRADIENT_OF)}
    return found, locate(points, values.whole(), parameters, tolerance)


def _split(task: Task, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[Results, nn.Module]:
    torch.compiler.reset()
    model = copy.deepcopy(task.model).to(dtype)
    args, kwargs = cast((task.args, dict(task.kwargs)), dtype)
    optimized = optimize(model, **options)
    with torch.set_grad_enabled(task.trains):
        return one_step(optimized, model, args, kwargs, task.loss), optimized


def _compared(ours: Results, task: Task) -> tuple[dict[str, float], tuple[str, ...]]:
    ours = none_for_zeros(ours, task.stock)
    found = disagreements(ours, task.stock)
    far = {name for name, value in found.items() if not value <= TOLERANCE[task.dtype]}
    if far and task.exact is not None:
        far -= excused(far, ours, task.stock, task.exact, task.dtype)
    return found, tuple(sorted(far))
