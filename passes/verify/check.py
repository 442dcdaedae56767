"""Run the local program on fake tensors and hold every value against the placement."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ringfx.comm.grad_accumulation import NO_CALL
from ringfx.errors import DEFECT, VerificationError
from ringfx.ir.values import Captured, Sites
from ringfx.ops import attention
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.rewrite import LocalProgram
from ringfx.passes.split_modes import local_shape
from ringfx.passes.token_axes.token_line import Lines
from ringfx.torch_compat.autograd import SET_GRAD_ENABLED
from ringfx.torch_compat.fake_tensors import FakeTensor, FakeTensorMode, as_fake

__all__ = ["line_inputs", "verify"]


def verify(captured: Captured, sites: Sites, local: LocalProgram) -> tuple[Any, ...]:
    """Check the local program; returns its fake inputs.

    Raises
    ------
    VerificationError
        When a local value has not the shape or type that its global one and placement imply, or
        an attention site was lost.
    """
    mode, inputs = _fake_inputs(captured, local)
    _interpret(local.graph_module, mode, inputs)
    for value, made in local.values.items():
        if value.op == "call_function":
            _check(value, made, local)
    _check_sites(sites, local)
    return inputs


def line_inputs(lines: Lines, rank: int, device: torch.device | str) -> list[torch.Tensor]:
    """Positions and order of each split line and the call, as the local program takes them."""
    tensors: list[torch.Tensor] = []
    for line in lines.lines:
        if line.layout.world_size > 1:
            tensors += [line.layout.positions(rank, device), line.layout.order(device)]
    return [*tensors, torch.full((), NO_CALL)] if tensors else []


def _fake_inputs(captured: Captured, local: LocalProgram) -> tuple[FakeTensorMode, tuple[Any, ...]]:
    inputs = [n for n in captured.graph_module.graph.nodes if n.op == "placeholder"]
    given = [n.meta["val"] for n in inputs]
    tensors = [v for v in given if isinstance(v, torch.Tensor)]
    mode = tensors[0].fake_mode if tensors else FakeTensorMode()  # type: ignore[attr-defined]
    with mode:
        extra = line_inputs(local.placement.lines, 0, local.placement.device)
        for i, node in enumerate(inputs):
            if i in local.states:
                given[i] = given[i].new_empty((local.states[i], *given[i].shape[1:]))
            elif local.placement.is_sharded(node):
                given[i] = given[i].new_empty(local_shape(local.placement.lines, node))
    return mode, (*given, *extra)


class _Recorder(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant of the program (a list made into a tensor) as a fake, like all else."""
        value = super().get_attr(target, args, kwargs)
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return as_fake(self._mode, value) if real else value

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
        return value


def _interpret(gm: torch.fx.GraphModule, mode: FakeTensorMode, inputs: tuple[Any, ...]) -> None:
    with mode, torch.no_grad():
        grad = torch.is_grad_enabled()
        try:
            _Recorder(gm, mode).run(*inputs)
        finally:
            SET_GRAD_ENABLED(grad)


def _check(value: Node, made: Node, local: LocalProgram) -> None:
    given, part = value.meta.get("val"), made.meta.get("val")
    if not isinstance(given, torch.Tensor):
        return
    if not isinstance(part, torch.Tensor):
        raise VerificationError(
            f"{describe_node(value)}: the local value is {type(part).__name__}, expected a tensor "
            f"{tuple(given.shape)}. {DEFECT}"
        )
    sharded = local.placement.is_sharded(value)
    expected = local_shape(local.placement.lines, value) if sharded else tuple(given.shape)
    if tuple(part.shape) != expected or part.dtype != given.dtype:
        raise VerificationError(
            f"{describe_node(value)}: local value {tuple(part.shape)} {part.dtype}, "
            f"expected {expected} {given.dtype} ({'sharded' if sharded else 'replicated'}). "
            f"{DEFECT}"
        )


def _check_sites(sites: Sites, local: LocalProgram) -> None:
    rewritten = sum(n.target is attention for n in local.graph_module.graph.nodes)
    if rewritten != len(sites.found):
        raise VerificationError(
            f"{len(sites.found)} attention sites were found and {rewritten} rewritten. {DEFECT}"
        )
