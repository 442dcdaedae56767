"""Ends what a rank waits for on its device, once another rank of the group has failed.

Messages of a NCCL group run on the device, which waits for a rank that does not come; only NCCL
itself can end them. Not tried on hardware.
"""

from __future__ import annotations

from typing import Any

import torch

from ringfx.torch_compat.distributed import backends_of, device_types

__all__ = ["abort", "may_be_aborted"]


def may_be_aborted(group: Any) -> bool:
    """Whether its messages run on a device, and end only so."""
    return any(device.type != "cpu" for device in device_types(group))


def abort(group: Any) -> bool:
    """End all pending messages of the group, which is of no more use; whether that was possible.

    ``ProcessGroup.abort`` where torch has it, else that of each of its backends.
    """
    ends = [group, *backends_of(group)]
    for end in ends:
        method = getattr(end, "abort", None) or getattr(end, "_abort", None)
        if method is None:
            continue
        try:
            method()
        except (RuntimeError, torch.distributed.DistBackendError):
            continue
        return True
    return False
