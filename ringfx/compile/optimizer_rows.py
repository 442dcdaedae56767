"""States that were loaded whole, in the place of sharded ones: this rank's rows of them.

A model is asked to load. Of an optimizer, torch takes what it is given: a plain tensor beside a
parameter that is a DTensor, which fails in the next step. A hook before every step cuts it.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["let_optimizers_load_whole_states", "rows_like"]


def rows_like(value: Any, like: Any) -> Any:
    """This rank's rows of a whole tensor that belongs in the place of a sharded one."""
    whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if not (whole and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    given = value.detach().to(like.device)
    return distribute_tensor(given, like.device_mesh, like.placements, src_data_rank=None)


@cache
def let_optimizers_load_whole_states() -> None:
    """From now on, in this process."""
    seen: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()

    def before_a_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if seen.get(optimizer) is optimizer.state:  # loading makes another
            return
        seen[optimizer] = optimizer.state
        for parameter, states in optimizer.state.items():
            states.update({name: rows_like(x, parameter) for name, x in states.items()})

    # A step that is compiled calls it too, outside.
    register_optimizer_step_pre_hook(torch.compiler.disable(before_a_step))
