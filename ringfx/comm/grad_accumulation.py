"""Parameter gradients that are held back while accumulating: ``with model.no_sync():``.

Each rank's backward gives parts of sums over the ranks. While held back, a rank keeps its parts
for itself, and parameters get zeros; the next backward outside adds them to its own parts before
they are summed, so that no message is sent twice and what was complete before stays as it is.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ringfx.comm.process_group import Ranks
from ringfx.errors import RingfxError
from ringfx.torch_compat.autograd import after_backward, version_of
from ringfx.torch_compat.distributed import like_whole, local_of

__all__ = ["NOT_REACHED", "NO_CALL", "Accumulation", "parts_to_send"]

NO_CALL = 0
"""Number of a call whose gradients are summed at once and never held."""

NOT_REACHED = -1
"""Stands for the number of an input that this backward gives no gradient: its part is zero."""

Parameter: TypeAlias = Callable[[], torch.Tensor | None]


@dataclass
class _PendingGradient:
    """This rank's part of one parameter's gradient, and the state of ``grad`` that goes with it."""

    parameter: Parameter
    part: torch.Tensor
    version: int | None = None


class Accumulation:
    """The held-back gradients of one model on one rank."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._syncing = True
        self._pending: dict[int, _PendingGradient] = {}
        self._numbers: dict[tuple[bool, tuple[int, ...]], int] = {}

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward of the calls made inside keeps its gradients on each rank."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def call(self, inputs: Sequence[Any]) -> int:
        """A number for a call of a program; the backward of the call is given it back."""
        parameters = [x if isinstance(x, torch.nn.Parameter) else None for x in inputs]
        key = (self._syncing, tuple(map(id, parameters)))
        known = _CALLS.get(self._numbers.get(key, NO_CALL))
        if known is None or any(
            ref() is not p for ref, p in zip(known.parameters, parameters, strict=True)
        ):
            references = tuple(_gone if p is None else weakref.ref(p) for p in parameters)
            self._numbers[key] = len(_CALLS) + 1
            _CALLS[len(_CALLS) + 1] = _Call(self, self._syncing, references)
        return self._numbers[key]

    def add_pending(self, parameters: Sequence[Parameter], parts: Sequence[torch.Tensor]) -> None:
        self._forget_cleared()
        for reference, part in zip(parameters, parts, strict=True):
            pending = self._pending.get(id(reference()))
            if reference is _gone:
                continue
            if pending is None:
                self._pending[id(reference())] = _PendingGradient(reference, part.clone())
            else:
                pending.part += part
        after_backward(self._note_versions)

    def release(
        self, parameters: Sequence[Parameter], parts: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The parts with what was held back for these parameters."""
        if not self._pending:
            return list(parts)
        self._forget_cleared()
        after_backward(self._flush)  # for parameters that this backward does not reach
        pending = [self._pending.pop(id(reference()), None) for reference in parameters]
        return [
            part if kept is None else part + kept.part
            for part, kept in zip(parts, pending, strict=True)
        ]

    def _forget_cleared(self) -> None:
        """``zero_grad`` clears what is held as it clears ``grad``."""
        for number, pending in list(self._pending.items()):
            parameter = pending.parameter()
            if pending.version is None:
                continue  # held back by the backward that is running
            grad = _grad_of(parameter)
            if grad is None or (version_of(grad) != pending.version and not grad.any()):
                del self._pending[number]
            elif version_of(grad) != pending.version:
                raise RingfxError(
                    "the gradients of this model were changed in place while no_sync() held "
                    "parts of them back, and the same change cannot be made to those parts. Do: "
                    "run one backward outside no_sync() before you scale or clip gradients."
                )

    def _note_versions(self) -> None:
        for pending in self._pending.values():
            grad = _grad_of(pending.parameter())
            if grad is not None:
                pending.version = version_of(grad)

    def _flush(self) -> None:
        """Sums what is held for parameters that the last backward did not reach."""
        by_dtype: dict[torch.dtype, list[_PendingGradient]] = {}
        for pending in self._pending.values():
            by_dtype.setdefault(pending.part.dtype, []).append(pending)
        self._pending.clear()
        for together in by_dtype.values():
            flat = torch.cat([pending.part.reshape(-1) for pending in together])
            ranks = Ranks.named(self._group, "outside attention")
            ranks.all_reduce("all-reduce of gradients accumulated under no_sync()", flat)
            sums = flat.split([pending.part.numel() for pending in together])
            for pending, total in zip(together, sums, strict=True):
                _add_to_grad(pending.parameter(), total)


def _gone() -> None:
    """Stands for an input that is no parameter."""


@dataclass(frozen=True, eq=False)
class _Call:
    owner: Accumulation
    syncing: bool
    parameters: tuple[Parameter, ...] = field(repr=False)


_CALLS: dict[int, _Call] = {}
"""Few: one for each program, set of parameters and mode."""


def parts_to_send(
    call: int, members: Sequence[int], parts: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor] | None:
    """This rank's parts of a sum, held-back ones included; None when they are held back too.

    Parameters
    ----------
    call
        As ``Accumulation.call`` gave it when the forward ran.
    members
        Which of that call's inputs the parts belong to; none: they are not parameters.
    """
    found = _CALLS.get(call)
    if found is None or not members:
        return parts
    parameters = [_gone if i == NOT_REACHED else found.parameters[i] for i in members]
    if found.syncing:
        return found.owner.release(parameters, parts)
    found.owner.add_pending(parameters, parts)
    return None


@torch.no_grad()
def _grad_of(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Of a DTensor that of this rank's part."""
    grad = None if parameter is None else parameter.grad
    return None if grad is None else local_of(grad)


def _add_to_grad(parameter: torch.Tensor | None, total: torch.Tensor) -> None:
    if parameter is None:
        return
    total = total.view(local_of(parameter).shape)
    grad = _grad_of(parameter)
    if grad is None:
        parameter.grad = like_whole(total.clone(), parameter)
    else:
        grad += total
