"""What torch.distributed spreads over ranks itself, beside ringfx: fully_shard.

fully_shard keeps its state by module object, and ringfx makes new objects.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ringfx.torch_compat.distributed import carry_composable_state

__all__ = ["carry_state"]


def carry_state(module: torch.nn.Module, twin: torch.nn.Module) -> None:
    """What fully_shard knows of a module holds for the object that shares its parameters too.

    So ``set_requires_gradient_sync``, ``unshard`` and the like work on what ``optimize`` returns,
    and the whole model sees that a part of it is sharded already.
    """
    if not dist.is_available():
        return
    carry_composable_state(module, twin)
