"""Where a split run first differs from the unsplit one: the values of its programs, by point.

Capture inlines modules, and passes replace what is in them. So a point of the unsplit model is not
looked up by a name: it is right if some value of the programs, gathered over the ranks, equals it,
and its gradient is right if one of those values has it too. A module whose inner values have no
equal, but whose own result has one, was only rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Interpreter, Node

from ringfx.comm.conjugate import all_gather_tokens
from ringfx.comm.world import World
from ringfx.comparison.points import Event, Recorded
from ringfx.compile.compilers import Compiled
from ringfx.compile.pipeline import Lowered
from ringfx.ir.values import Arrival
from ringfx.passes.token_axes import TokenDim

__all__ = ["Located", "Value", "Values", "locate"]


@dataclass(frozen=True, kw_only=True)
class Located:
    """The first difference, in the order in which the unsplit model computes."""

    order: int
    """Number of the event; those of backward follow those of forward."""
    layer: str
    """Path of the module."""
    what: str
    """In words: what of it differs, and in which direction."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of the global program, whole, and its gradient."""

    value: torch.Tensor
    grad: torch.Tensor | None


class _Held:
    """What this rank holds of one value."""

    def __init__(self, local: torch.Tensor, arrival: Arrival | None, node: Node) -> None:
        self.local, self.arrival = local.detach(), arrival
        self.shape = node.meta["val"].shape
        self.trains = local.requires_grad
        self.grad: torch.Tensor | None = None
        if self.trains:
            local.register_hook(self._arrives)  # type: ignore[no-untyped-call]

    def _arrives(self, grad: torch.Tensor) -> None:
        self.grad = grad.detach()

    def whole(self, world: World) -> Value:
        """Collective: every rank calls it for the same values, in one order."""
        value = self._gathered(self.local, world)
        if not self.trains:
            return Value(value=value, grad=None)
        # A value that takes no part in the loss on this rank may take part on another.
        grad = torch.zeros_like(self.local) if self.grad is None else self.grad
        return Value(value=value, grad=self._gathered(grad, world))

    def _gathered(self, x: torch.Tensor, world: World) -> torch.Tensor:
        if self.arrival is None or world.size == 1:
            return x
        at = self.arrival
        order = at.layout.order(x.device)[at.offset : at.offset + at.length]
        where = (world.size, world.group, at.dim, at.outer, at.inner, "a value that is compared")
        return all_gather_tokens(x.contiguous(), order, *where)


class Values:
    """An observer that keeps every floating-point value of the programs that run."""

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._world: World | None = None

    def runs(self, lowered: Lowered, world: World) -> Compiled:
        self._world = world
        lines = lowered.local.placement.lines
        placement = lowered.local.placement
        wanted: dict[Node, list[tuple[Node, Arrival | None]]] = {}
        for value, made in lowered.local.values.items():
            if not _is_floating(value):
                continue
            tokens = lines.token_dim(value)
            arrival = None
            if placement.is_sharded(value):
                assert isinstance(tokens, TokenDim)
                arrival = lines.arrival(tokens)
            wanted.setdefault(made, []).append((value, arrival))
        keeps = _Keeps(lowered.local.graph_module, wanted, self._held.append)

        def run(*inputs: Any) -> Any:
            return keeps.run(*inputs)

        return run

    def whole(self) -> list[Value]:
        """All of them, gathered."""
        assert self._world is not None, "a program has run"
        return [held.whole(self._world) for held in self._held]


class _Keeps(Interpreter):
    def __init__(
        self,
        gm: torch.fx.GraphModule,
        wanted: dict[Node, list[tuple[Node, Arrival | None]]],
        keep: Callable[[_Held], None],
    ) -> None:
        super().__init__(gm)
        self._wanted, self._keep = wanted, keep

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            for node, arrival in self._wanted.get(n, ()):
                if arrival is not None or result.shape == node.meta["val"].shape:
                    self._keep(_Held(result, arrival, node))
        return result


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def locate(
    recorded: Recorded, values: Sequence[Value], wrong: Iterable[str], tolerance: float
) -> Located | None:
    """The first event of the unsplit model that has no equal in the split run.

    Parameters
    ----------
    values
        Of the split run's programs (``Values.whole``).
    wrong
        Parameters whose gradients differ.
    tolerance
        Relative to the largest number of a point.
    """
    return _Search(recorded, values, set(wrong), tolerance).first()


class _Search:
    def __init__(
        self, recorded: Recorded, values: Sequence[Value], wrong: set[str], tolerance: float
    ) -> None:
        self.recorded, self.wrong, self.tolerance = recorded, wrong, tolerance
        by_size: dict[int, list[Value]] = {}
        for x in values:
            by_size.setdefault(x.value.numel(), []).append(x)
        self.equals = [
            [x for x in by_size.get(p.value.numel(), ()) if self._same(x.value, p.value)]
            for p in recorded.points
        ]

    def first(self) -> Located | None:
        return self._in_forward() or self._in_backward()

    def _in_forward(self) -> Located | None:
        for order, event in enumerate(self.recorded.forward):
            point = self.recorded.points[event.point]
            if self.equals[event.point] or self._was_rewritten(event):
                continue
            if event.kind == "gives":
                return Located(order=order, layer=event.module, what="its output")
            if point.trains and not point.given_by:
                return Located(
                    order=order, layer=_parent(event.module),
                    what=f"what it hands to {_last(event.module)}",
                )  # fmt: skip
        return None

    def _was_rewritten(self, event: Event) -> bool:
        """Whether a module around the event gave what it should."""
        around = {event.module} if event.kind == "takes" else set()
        name = event.module
        while name:
            name = _parent(name)
            around.add(name)
        given = [
            self.equals[e.point]
            for e in self.recorded.forward
            if e.kind == "gives" and e.module in around
        ]
        return any(given)

    def _in_backward(self) -> Located | None:
        start = len(self.recorded.forward)
        for order, event in enumerate(self.recorded.backward, start):
            if event.kind == "parameter":
                if event.module in self.wrong:
                    what = f"the gradient of its {_last(event.module)}"
                    return Located(order=order, layer=_parent(event.module), what=what)
                continue
            point, equals = self.recorded.points[event.point], self.equals[event.point]
            grads = [x.grad for x in equals if x.grad is not None]
            assert point.grad is not None
            if not grads or any(self._same(g, point.grad) for g in grads):
                continue
            layer, what = self._user(event.point)
            return Located(order=order, layer=layer, what=what)
        return None

    def _user(self, number: int) -> tuple[str, str]:
        """The innermost module that computes with a point: its backward gave the gradient."""
        point = self.recorded.points[number]
        takers = list(dict.fromkeys(point.taken_by))
        inner = [m for m in takers if not any(o != m and _is_inside(o, m) for o in takers)]
        inner = [m for m in inner if m not in point.given_by]
        if inner:
            return _common(inner), "the gradient of its input"
        if point.given_by:
            giver = point.given_by[0]
            return _parent(giver), f"the gradient of what {_last(giver)} gives it"
        return "", "the gradient of its input"

    def _same(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        if ours.numel() != theirs.numel():
            return False
        ours, theirs = ours.reshape(-1).double(), theirs.reshape(-1).double()
        scale = theirs[theirs.isfinite()].abs().max() if theirs.numel() else theirs.new_zeros(())
        off = torch.where(ours == theirs, 0.0, ours - theirs).abs()
        return bool((off <= self.tolerance * scale).all())


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _common(paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    same: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        same.append(level[0])
    return ".".join(same)
