"""Values that one program of a model hands to the next, where Python runs between the two.

A split value stays split: the next program takes each rank's part, and its gradient comes back
split. Where that program cannot, or Python itself reads more than a rank has, it is gathered, and
announced with the frame that asked for it.
"""

from __future__ import annotations

import contextlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeGuard

import torch

from ringfx.comm.conjugate import slice_tokens
from ringfx.ir.values import Collective, CommKind
from ringfx.split_tensor.autograd import part
from ringfx.split_tensor.spec import GatherObserver, SplitSpec
from ringfx.split_tensor.tensor import SplitTensor
from ringfx.torch_compat.autograd import in_backward
from ringfx.torch_compat.fake_tensors import TracingContext
from ringfx.units.format import format_bytes

__all__ = ["ProgramHandoff", "global_example", "is_split", "local_example"]


class ProgramHandoff:
    """Hands values from one program of a model to the next, on one rank."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self.moved: list[Collective] = []
        """By the model's current or last call, and its backward."""
        self.running = False
        """Whether the model is being called: its results may be another program's inputs."""
        self.called = False
        """Whether it says so at all: ``torch.compile(backend="ringfx")`` does not."""

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """The model runs inside."""
        before, self.running, self.called = self.running, True, True
        self.moved.clear()
        try:
            yield
        finally:
            self.running = before

    def on_gather(self, graph_break: str | None) -> GatherObserver | None:
        """The observer of gathers of a program's results, also by code outside the model."""
        if self.called:
            return _HandoffObserver(handoff=self) if self.running else None
        return _HandoffObserver(handoff=self, always=graph_break is not None)

    def whole(self, value: Any) -> Any:
        """An input that the program takes whole."""
        return value.whole() if isinstance(value, SplitTensor) else value

    def part(self, value: torch.Tensor, spec: SplitSpec) -> torch.Tensor:
        """An input of which the program takes this rank's part."""
        if isinstance(value, SplitTensor) and value._spec == spec:
            return part(value, _HandoffObserver(handoff=self, always=True))
        whole: torch.Tensor = self.whole(value)
        order, own = spec.order(whole.device), spec.layout.positions(spec.rank, whole.device)
        index = (own - spec.offset).remainder(spec.length)
        where = (spec.layout.world_size, spec.group, spec.dim, spec.outer, spec.inner, spec.name)
        return slice_tokens(whole, index, order, *where)

    def note(self, name: str, num_bytes: int, kind: CommKind) -> None:
        """Record a gather in the plan, and warn the user once."""
        where, in_backward = users_frame(), kind is CommKind.ALL_GATHER_GRADIENT
        if not self.running and (caller := outside_of_libraries()):
            where += f" (called from {caller})"
        outside = "runs outside the compiled programs"
        self.moved.append(
            Collective(
                node="python", name=name, source=where, kind=kind, bytes_moved=num_bytes,
                reason=f"its backward {outside}" if in_backward else f"it {outside}",
                in_backward=in_backward,
            )
        )  # fmt: skip
        size = format_bytes(num_bytes)
        self._announce(
            f"{name}: gathers {size} on every rank for {where}, "
            f"{'whose backward' if in_backward else 'which'} {outside}"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _HandoffObserver:
    handoff: ProgramHandoff
    always: bool = False

    @property
    def model_runs(self) -> bool:
        return self.always or self.handoff.running or in_backward()

    def __call__(self, spec: SplitSpec, num_bytes: int) -> None:
        kind = CommKind.ALL_GATHER_GRADIENT if in_backward() else CommKind.ALL_GATHER
        self.handoff.note(spec.name, num_bytes, kind)


def users_frame() -> str:
    """The innermost frame that is neither torch's nor ours: ``model.py:12, in forward``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in ("torch", "ringfx"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back
    return "a frame that is not Python"


def outside_of_libraries() -> str:
    """The user's own line, where a library such as accelerate runs: ``train.py:33, in main``."""
    frame: FrameType | None = sys._getframe()
    is_inside = False
    while frame is not None:
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        installed = file.startswith((*_LIBRARIES, "<"))
        if not installed and module.partition(".")[0] != "ringfx":
            return f"{file}:{frame.f_lineno}, in {frame.f_code.co_name}" if is_inside else ""
        is_inside |= installed and module.partition(".")[0] != "torch"
        frame = frame.f_back
    return ""


_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
"""Folders of Python's own library and of what was installed."""


def is_split(value: Any) -> TypeGuard[SplitTensor]:
    return isinstance(value, SplitTensor)


def global_example(value: Any) -> Any:
    """A tensor of the global shape for compilation; it requires a gradient if the value does."""
    if not isinstance(value, SplitTensor):
        return value
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    with mode or contextlib.nullcontext():  # of no memory, where that is possible
        made = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        if not value.requires_grad:
            return made
        with torch.enable_grad():  # a leaf could not be written
            made.requires_grad_()
            return made if value.is_leaf else made.clone()


def local_example(value: SplitTensor) -> torch.Tensor:
    """A tensor of the local shape for compilation."""
    return torch.empty_like(
        value._local, memory_format=torch.contiguous_format, requires_grad=value.requires_grad
    )
