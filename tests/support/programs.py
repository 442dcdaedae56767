"""Programs of one module, captured and lowered in this process without ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ringfx.comm.world import World
from ringfx.compile.dynamo import for_ringfx, prepare_tracing
from ringfx.compile.pipeline import Lowered, lower
from ringfx.compile.settings import Settings
from ringfx.ir.values import Captured
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture

__all__ = ["Attend", "captured", "captured_with_inputs", "lowered", "program_text", "traced"]


class _Stop(Exception):
    """Ends a call once its graph was seen."""


def traced(model: Callable[..., Any], *args: Any, see: Callable[..., Any], **kwargs: Any) -> Any:
    """What ``see(graph module, example inputs)`` makes of Dynamo's first graph of the call."""
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        found.append(see(gm, example_inputs))
        raise _Stop

    torch._dynamo.reset()
    prepare_tracing()
    try:
        torch.compile(model, backend=for_ringfx(backend), dynamic=False)(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as failure:
        if not isinstance(failure.inner_exception, _Stop):
            raise failure.inner_exception from None
    finally:
        torch._dynamo.reset()
    assert found, "Dynamo made no graph"
    return found[0]


def captured(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
    return captured_with_inputs(model, *args, **kwargs)[0]


def captured_with_inputs(
    model: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Captured, list[Any]]:
    """The program and the values of its placeholders in this call."""

    def see(gm: torch.fx.GraphModule, inputs: Any) -> tuple[Captured, list[Any]]:
        return capture(gm, inputs, known=find_rule), list(inputs)

    found: tuple[Captured, list[Any]] = traced(model, *args, see=see, **kwargs)
    return found


def lowered(
    model: Callable[..., Any], *args: Any, ranks: int = 2, rank: int = 0, **options: Any
) -> Lowered:
    """The local program of one of ``ranks`` ranks that do not exist."""
    settings = Settings.of({"strategy": "production"} | options)
    world = World(ranks, rank, "ringfx" if ranks > 1 else "")
    result: Lowered = traced(
        model, *args, see=lambda gm, inputs: lower(gm, inputs, settings, world)
    )
    return result


def program_text(program: Lowered) -> str:
    graph = program.local.graph_module.graph
    return "\n".join(f"{n.format_node()} {_shape(n.meta.get('val'))}" for n in graph.nodes)


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if hasattr(value, "shape") else ""


class Attend(nn.Module):
    """One attention under a mask that a function makes from the lengths and further inputs."""

    def __init__(self, mask: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.mask = mask
        self.options = options

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *inputs: torch.Tensor
    ) -> torch.Tensor:
        mask = self.mask(q.shape[-2], k.shape[-2], *inputs)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.options)
