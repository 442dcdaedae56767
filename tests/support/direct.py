"""Programs taken from make_fx instead of Dynamo, recovered and run in this process: quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.ir.values import Captured, Sites
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture
from ringfx.passes.detect import detect
from ringfx.passes.masks import recover

Tensor = torch.Tensor


def program_of(model: nn.Module, args: Sequence[Tensor]) -> tuple[Captured, list[Tensor]]:
    """The model's program on its parameters and arguments, and their values."""
    values = [p for _, p in model.named_parameters()]
    with torch.enable_grad():
        graph = make_fx(partial(called, model), pre_dispatch=True)(*values, *args)
    return capture(graph, [*values, *args], known=find_rule), [*values, *args]


def canonical(program: Captured) -> Sites:
    return recover(program, detect(program))


def results(program: Captured, values: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradient of every floating input, of a loss that weighs all outputs."""
    return results_of(torch.fx.Interpreter(program.graph_module).run, values)


def called(model: nn.Module, *given: Tensor) -> Any:
    """The model on its parameters and arguments, as the program of ``program_of`` takes them."""
    names = [n for n, _ in model.named_parameters()]
    parameters = dict(zip(names, given, strict=False))
    return torch.func.functional_call(model, parameters, given[len(names) :])


def results_of(call: Callable[..., Any], values: Sequence[Tensor]) -> list[Tensor]:
    leaves = [v.detach().clone().requires_grad_(v.is_floating_point()) for v in values]
    found = call(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    wanted = [x for x in leaves if x.requires_grad]
    weighed = [o * torch.arange(o.numel()).view(o.shape).cos() for o in outputs]
    loss = torch.stack([x.sum() for x in weighed]).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    empty = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
    return [*(o.detach() for o in outputs), *empty]


def worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest relative difference; infinite where one is NaN and the other is not."""
    found = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = a.nan_to_num(), b.nan_to_num()
        if a.numel():
            found = max(found, float((a - b).abs().max() / b.abs().max().clamp(min=1e-2)))
    return found
