"""fully_shard beside ringfx: it keeps its state by module object, and ringfx makes new objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ringfx.errors import InvalidArgument

__all__ = ["carry_state", "refuse_sharded_part"]


def carry_state(module: torch.nn.Module, twin: torch.nn.Module) -> None:
    """What fully_shard knows of a module holds for the object that shares its parameters too.

    So ``set_requires_gradient_sync``, ``unshard`` and the like work on what ``optimize`` returns.
    """
    if not dist.is_available():
        return
    from torch.distributed import _composable_state as states

    state = states._get_module_state(module)
    if state is not None and states._get_module_state(twin) is None:
        states._insert_module_state(twin, state)


def refuse_sharded_part(parts: Mapping[str, Any]) -> None:
    """``fully_shard(optimized.part)``: the whole model does not see that the part is sharded.

    Raises
    ------
    InvalidArgument
        It names the part and the two orders that work.
    """
    if not dist.is_available():
        return
    from torch.distributed._composable_state import _get_module_state

    for name, part in parts.items():
        if _get_module_state(part) is not _get_module_state(part._ringfx_inner):
            raise InvalidArgument(
                f"fully_shard was applied to model.{name} of an optimized model, which is a face "
                "of that part, not the part itself. Do: apply fully_shard to the parts and to the "
                "model first, and then call ringfx.optimize(model)."
            )
