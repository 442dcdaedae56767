"""The unsplit model's values where modules begin and end, with their gradients, in order.

A *point* is one tensor that a module took or gave. What modules do in between (functions that their
``forward`` calls) is told by the points around it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ringfx.comparison.results import Loss, one_step, tensors

__all__ = ["Event", "Point", "Recorded", "record"]


@dataclass(kw_only=True)
class Point:
    """One tensor of the unsplit model."""

    value: torch.Tensor
    trains: bool
    grad: torch.Tensor | None = None
    given_by: list[str] = field(default_factory=list)
    """Modules that returned it, the innermost first."""
    taken_by: list[str] = field(default_factory=list)
    """Modules that took it, the outermost first."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A module takes or gives a point (forward); the gradient of one is known (backward)."""

    kind: str
    """``takes``, ``gives``; ``gradient``; ``parameter`` for the gradient of one."""
    module: str
    """Its path; of a parameter the parameter's name."""
    point: int = -1


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A forward and a backward of the unsplit model."""

    points: tuple[Point, ...]
    forward: tuple[Event, ...]
    backward: tuple[Event, ...]
    modules: frozenset[str]


def record(model: nn.Module, args: Any, kwargs: Any, loss: Loss | None) -> Recorded:
    """One step of the unsplit model, with a hook at every module and parameter."""
    recorder = _Recorder()
    with recorder.hooked(model):
        one_step(model, model, args, kwargs, loss)
    modules = frozenset(name for name, _ in model.named_modules())
    return Recorded(
        points=tuple(recorder.points), forward=tuple(recorder.forward),
        backward=tuple(recorder.backward), modules=modules,
    )  # fmt: skip


class _Recorder:
    def __init__(self) -> None:
        self.points: list[Point] = []
        self.forward: list[Event] = []
        self.backward: list[Event] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        """So that no tensor gets the id of another."""

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        for name, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(self._takes(name), with_kwargs=True, prepend=True)
            )
            handles.append(module.register_forward_hook(self._gives(name)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handles.append(
                    parameter.register_post_accumulate_grad_hook(self._accumulates(name))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _takes(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            for number in self._numbered((args, kwargs)):
                self.points[number].taken_by.append(name)
                self.forward.append(Event(kind="takes", module=name, point=number))

        return hook

    def _gives(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, _args: Any, output: Any) -> None:
            for number in self._numbered(output):
                self.points[number].given_by.append(name)
                self.forward.append(Event(kind="gives", module=name, point=number))

        return hook

    def _accumulates(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            self.backward.append(Event(kind="parameter", module=name))

        return hook

    def _numbered(self, values: Any) -> list[int]:
        floating = [x for x in tensors(values).values() if x.is_floating_point()]
        return [self._number(x) for x in floating]

    def _number(self, x: torch.Tensor) -> int:
        if id(x) in self._numbers:
            return self._numbers[id(x)]
        number = self._numbers[id(x)] = len(self.points)
        self._alive.append(x)
        self.points.append(Point(value=x.detach().clone(), trains=x.requires_grad))

        def arrives(grad: torch.Tensor) -> None:
            self.points[number].grad = grad.detach().clone()
            self.backward.append(Event(kind="gradient", module="", point=number))

        if x.requires_grad:
            x.register_hook(arrives)  # type: ignore[no-untyped-call]
        return number
