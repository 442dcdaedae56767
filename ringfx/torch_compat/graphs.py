"""Nodes of fx graphs, and modules.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = [
    "call_in_frame",
    "call_of",
    "children_of",
    "has_hooks",
    "hooks_of_all",
    "is_erased",
    "position_key",
]


def is_erased(node: torch.fx.Node) -> bool:
    """Whether the node has left its graph. Without: dropping block masks of flex attention."""
    return node._erased


def position_key(node: torch.fx.Node) -> Any:
    """Sorts nodes as they stand in their graph. Without: detection of attention."""
    return node._sort_key


def call_of(module: torch.nn.Module) -> Any:
    """A module's call with its hooks, below ``compile``. Without: compiling a model's call."""
    return module._call_impl


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether something runs before or after its forward. Without: models with hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hooks_of_all() -> tuple[int, ...]:
    """What runs at the call of every module of the process, by the numbers of its handles.

    Dynamo traces it, and does not look again whether there is more of it. Without: such hooks.
    """
    given = torch.nn.modules.module
    held = (
        given._global_forward_pre_hooks,
        given._global_forward_hooks,
        given._global_backward_pre_hooks,
        given._global_backward_hooks,
    )
    return tuple(number for hooks in held for number in hooks)


def call_in_frame(module: torch.nn.Module, call: Callable[..., Any]) -> None:
    """Let ``module(...)`` be that call, unless the user has compiled the module.

    ``nn.Module.compile`` keeps its program there; copies and pickles are without it. Without:
    modules with hooks between breaks of the graph.
    """
    if module._compiled_call_impl is None:
        module._compiled_call_impl = call


def children_of(module: torch.nn.Module) -> Mapping[str, torch.nn.Module | None]:
    """The module's own parts, by name, as it holds them. Without: optimizing parts of a model."""
    return module._modules
