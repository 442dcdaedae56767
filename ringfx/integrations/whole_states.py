"""Sharded states in checkpoints: whole ones, which any number of ranks loads."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from ringfx.torch_compat.pytree import tree_map

__all__ = ["WholeStates"]


class WholeStates:
    """A model or an optimizer whose states are sharded, saved and loaded as whole ones.

    All ranks ask for ``state_dict`` together, and get it in the host's memory.
    """

    def __init__(self, given: Any) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map(
            lambda x: x.full_tensor().cpu() if isinstance(x, DTensor) else x,
            self._given.state_dict(*args, **kwargs),
        )
