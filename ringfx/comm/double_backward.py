"""Second derivatives: not supported, and refused by name under every compiler.

With ``create_graph=True`` autograd records backward itself. The backward of ringfx's operators has
no backward, and neither has a program compiled by AOTAutograd. Without this module torch would
report a missing formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ringfx.comm.autograd_function import Function, register_autograd
from ringfx.errors import RingfxError

__all__ = ["once_differentiable", "refuse_double_backward", "refuse_in_compiled"]

TEXT = (
    "second derivatives are not supported: the backward of a model that ringfx has split cannot "
    "be differentiated again (create_graph=True: gradient penalties, Hessian-vector products). "
    "Do: compute them with the original model, which runs unsharded; or compute a Hessian-vector "
    "product as a difference of two gradients."
)


def refuse_double_backward(operator: Any) -> None:
    """For an operator that runs in backward: its own backward raises."""
    register_autograd(operator, _refuse)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RingfxError(TEXT)


class _Once(Function):
    """Identity; its backward refuses."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RingfxError(TEXT)


def once_differentiable(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient that plain operators made of saved ones: its backward, if recorded, refuses."""
    if not torch.is_grad_enabled():
        return gradient
    return _Once.apply(gradient.detach().requires_grad_())  # type: ignore[no-any-return, no-untyped-call]


def refuse_in_compiled(results: Sequence[Any]) -> None:
    """Make gradients from compiled programs refuse a backward, where autograd records them."""
    nodes = {node for x in results if (node := _compiled_node(x)) is not None}
    for node in nodes:
        node.register_hook(_mark)


def _compiled_node(result: Any) -> Any:
    """The backward of a program that AOTAutograd compiled; a result may be a view of its own."""
    node = result.grad_fn if isinstance(result, torch.Tensor) else None
    while node is not None and not type(node).__name__.startswith("CompiledFunction"):
        before = node.next_functions
        node = before[0][0] if len(before) == 1 else None
    return node


def _mark(gradients: Sequence[Any], _incoming: Any) -> Any:
    if not torch.is_grad_enabled():
        return None
    return tuple(
        _Once.apply(x) if isinstance(x, torch.Tensor) and x.requires_grad else x  # type: ignore[no-untyped-call]
        for x in gradients
    )
