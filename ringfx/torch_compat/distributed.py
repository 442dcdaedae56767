"""Process groups: by name, their store, and what lies below them.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

__all__ = [
    "PrefixStore", "Store", "TCPStore", "backends_of", "carry_composable_state", "default_store",
    "device_types", "flattened", "group_named", "timeout_of",
]  # fmt: skip


PrefixStore = c10d.PrefixStore
"""A part of a store. torch.distributed has the three under these names too, without types.
Without: ranks on this machine, hearing which rank failed and why."""

Store = c10d.Store
"""Values that the ranks of a group share."""

TCPStore = c10d.TCPStore
"""One that a process serves."""


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that name, as a program holds it. Without: every collective."""
    found: Any = dist.distributed_c10d
    group: dist.ProcessGroup = found._resolve_process_group(name)
    return group


def default_store() -> Any:
    """The store of the default group. Without: hearing which rank failed and why."""
    found: Any = dist.distributed_c10d
    return found._get_default_store()


def device_types(group: Any) -> list[torch.device]:
    """Devices for which a group has a backend. Without: its timeout, and aborting NCCL groups."""
    return list(group._device_types)


def backends_of(group: Any) -> list[Any]:
    """The group's backend for each device. Without: its timeout, and aborting NCCL groups."""
    return [group._get_backend(device) for device in device_types(group)]


def timeout_of(group: Any) -> datetime.timedelta | None:
    """How long the group's messages wait, where a backend says it. Without: 30 minutes is taken."""
    for backend in backends_of(group):
        options = getattr(backend, "options", None)
        if options is not None:
            found: datetime.timedelta = options._timeout
            return found
    return None


def flattened(mesh: Any) -> Any:
    """One dimension of all of a DeviceMesh's, in order. Without: states over dp_shard x cp."""
    return mesh._flatten() if mesh.ndim > 1 else mesh


def carry_composable_state(module: torch.nn.Module, twin: torch.nn.Module) -> None:
    """What fully_shard keeps by module object, for another object too. Without: fully_shard."""
    from torch.distributed import _composable_state as states

    state = states._get_module_state(module)
    if state is not None and states._get_module_state(twin) is None:
        states._insert_module_state(twin, state)
