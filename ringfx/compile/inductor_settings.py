"""What Inductor is asked for beside the user's own settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Graph

from ringfx.compile.inductor_no_fusion import InsertBarriers, RemoveBarriers
from ringfx.compile.offload import MoveOffloaded
from ringfx.compile.prefetch import OverlapStates
from ringfx.torch_compat.inductor import CustomGraphPass, config

__all__ = ["inductor_settings"]


def inductor_settings() -> Mapping[str, Any]:
    """Inductor's settings for one compilation; the user's own passes stay."""
    return {
        "joint_custom_pre_pass": _beside(config.joint_custom_pre_pass, InsertBarriers()),
        "joint_custom_post_pass": _beside(
            config.joint_custom_post_pass, RemoveBarriers(), MoveOffloaded()
        ),
        "post_grad_custom_post_pass": _beside(config.post_grad_custom_post_pass, OverlapStates()),
    }


def _beside(users: Any, *ours: CustomGraphPass) -> Any:
    if users is None:
        return ours[0] if len(ours) == 1 else _InOrder(ours)
    return _InOrder([*(users if isinstance(users, (list, tuple)) else (users,)), *ours])


class _InOrder(CustomGraphPass):
    """Several passes as one: torch 2.11 takes no list."""

    def __init__(self, passes: Sequence[Callable[[Graph], None]]) -> None:
        self._passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> Any:
        """None, which keeps the program out of Inductor's cache, if a pass has no name."""
        names = [each.uuid() for each in self._passes if isinstance(each, CustomGraphPass)]
        return names if all(names) and len(names) == len(self._passes) else None
