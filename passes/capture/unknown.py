"""Operators that later passes have no rule for, taken apart with torch's own decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["decompose_unknown"]

Known = Callable[[object], object | None]
MAX_ROUNDS = 4
"""A decomposition may use further unknown operators."""


def decompose_unknown(
    gm: torch.fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Any], known: Known
) -> torch.fx.GraphModule:
    """Trace again with a decomposition for each unknown operator that has one."""
    for _ in range(MAX_ROUNDS):
        table = _table(gm, known)
        if not table:
            return gm
        with mode, fx_traceback.preserve_node_meta():
            gm = make_fx(
                torch.fx.Interpreter(gm).run, decomposition_table=table, pre_dispatch=True
            )(*inputs)
    return gm


def _table(gm: torch.fx.GraphModule, known: Known) -> dict[OpOverload, Callable[..., Any]]:
    table: dict[OpOverload, Callable[..., Any]] = {}
    for node in gm.graph.nodes:
        op = node.target
        if not isinstance(op, OpOverload) or known(op) is not None or op._schema.is_mutable:
            continue
        if op in decomposition_table:
            table[op] = decomposition_table[op]
        elif op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            table[op] = op.decompose
    return table
