"""Operators of torch: what they are called with, and what they are made of.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch._ops

__all__ = [
    "DispatchKey", "HigherOrderOperator", "OpOverload", "OpOverloadPacket", "decompositions",
    "names_with_kernel", "read_no_memory", "schema_of",
]  # fmt: skip

OpOverload = torch._ops.OpOverload
"""One overload of an operator: the key of every table of rules. Without: all passes."""

OpOverloadPacket = torch._ops.OpOverloadPacket
"""All overloads of an operator. Without: the error for a rule that was given for a packet."""

HigherOrderOperator = torch._ops.HigherOrderOperator
"""An operator that takes programs: checkpoints, flex attention, cond. Without: their capture."""

DispatchKey = torch._C.DispatchKey
"""Under which key an operator has a kernel. Without: the casts of autocast, and which operators
autograd looks into."""


def read_no_memory(error: BaseException) -> bool:
    """Whether an operator says that it read a tensor without memory. Without: naming a sharded
    parameter that uncompiled code is given."""
    texts = ("data is not allocated yet", "are out of bounds for storage of size 0")
    return any(text in str(error) for text in texts)


def schema_of(op: Any) -> Any:
    """Arguments and results of an operator, with what is written and what is a view.

    Without: reading arguments by name, functional forms of writes, split tensors' calls.
    """
    return op._schema


def names_with_kernel(key: str) -> Iterable[str]:
    """All operators that are registered for a dispatch key. Without: the casts of autocast."""
    names: Iterable[str] = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return names


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """torch's own definitions of operators by others; the module is loaded when asked for.

    Without: operators without a row of their own, and formatting of split tensors.
    """
    from torch._decomp import decomposition_table

    return decomposition_table
