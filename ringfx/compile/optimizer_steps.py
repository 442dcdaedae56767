"""What optimizers did with sharded parameters: it must be alike on every rank, as rows are not.

Parameters that every rank holds whole are compared by their sums, in turn. Of sharded ones each
rank holds other rows, so that a step which one rank skips, or makes with another learning rate,
leaves nothing to compare: parameters whose rows come from different steps. A hook before every
step notes how many a parameter has had, and with which settings.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Steps", "note_steps", "steps_of"]


@dataclass(frozen=True)
class Steps:
    """Of one parameter, on this rank."""

    number: int = 0
    settings: str = ""
    """Of the last one: ``betas=(0.9, 0.999); lr=0.1``."""

    alike: int = 0
    """Differs where any of the steps had other settings."""

    def and_one(self, settings: str) -> Steps:
        """After a step with these settings."""
        return Steps(self.number + 1, settings, zlib.crc32(settings.encode(), self.alike))

    def others_than(self, other: Steps) -> str:
        """The settings of the last step that the other did not have."""
        theirs = other.settings.split("; ")
        return ", ".join(x for x in self.settings.split("; ") if x not in theirs) or "the same"


_noted: Any = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]


def steps_of(parameter: torch.Tensor) -> Steps:
    """Since it was sharded."""
    found: Steps = _noted.get(parameter, Steps())
    return found


@cache
def note_steps() -> None:
    """From now on, in this process."""

    def before_a_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            stepped = [p for p in group["params"] if isinstance(p, DTensor) and p.grad is not None]
            settings = _settings(group) if stepped else ""
            for parameter in stepped:
                _noted[parameter] = steps_of(parameter).and_one(settings)

    # A step that is compiled calls it too, outside.
    register_optimizer_step_pre_hook(torch.compiler.disable(before_a_step))


def _settings(group: Mapping[str, Any]) -> str:
    said = {name: _said(value) for name, value in group.items() if name != "params"}
    return "; ".join(f"{name}={value}" for name, value in sorted(said.items()) if value)


def _said(value: Any) -> str:
    """Of a number or several; empty for anything else, and for what is waited for."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return str(value.item())
    if isinstance(value, tuple | list):
        parts = [_said(x) for x in value]
        return f"({', '.join(parts)})" if all(parts) else ""
    return str(value) if isinstance(value, bool | int | float) else ""
