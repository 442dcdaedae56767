"""Operators that later passes have no rule for, taken apart where their gradient stays the same.

Two kinds: what autograd itself looks into (CompositeImplicitAutograd), by its own definition; and
rows of ``decomposable.py``, with torch's decomposition. All others keep their own derivative and
stay. A decomposition is taken only if it is made of operators that autograd knows (torch's
references also go down to ``prims``, which have no gradient). One that writes nothing is preferred;
writes are made values afterwards as the user's own are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ringfx.passes.capture.decomposable import DECOMPOSABLE
from ringfx.passes.capture.strided import as_read
from ringfx.torch_compat.dispatch import TorchDispatchMode
from ringfx.torch_compat.fake_tensors import FakeTensorMode
from ringfx.torch_compat.operators import DispatchKey, OpOverload, decompositions, schema_of

__all__ = ["decompose_unknown"]

Decomposition = Callable[..., Any]
Known = Callable[[object], object | None]
MAX_ROUNDS = 4
"""A decomposition may use further unknown operators."""


def decompose_unknown(
    gm: torch.fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Any], known: Known
) -> torch.fx.GraphModule:
    """Trace again with a decomposition for each unknown operator that has one."""
    for _ in range(MAX_ROUNDS):
        table = _table(gm, mode, known)
        if not table:
            return gm
        with mode, fx_traceback.preserve_node_meta():
            gm = make_fx(
                torch.fx.Interpreter(gm).run, decomposition_table=table, pre_dispatch=True
            )(*inputs)
    return gm


def _table(
    gm: torch.fx.GraphModule, mode: FakeTensorMode, known: Known
) -> dict[OpOverload, Decomposition]:
    table: dict[OpOverload, Decomposition] = {}
    stay: set[OpOverload] = set()
    for node in gm.graph.nodes:
        op = node.target
        if not isinstance(op, OpOverload) or known(op) is not None or schema_of(op).is_mutable:
            continue
        chosen = _chosen(op, node, mode)
        if chosen is None:
            stay.add(op)
        else:
            table[op] = chosen
    return {op: chosen for op, chosen in table.items() if op not in stay}


def _chosen(op: OpOverload, node: Node, mode: FakeTensorMode) -> Decomposition | None:
    """The first decomposition that writes nothing, else the first that autograd knows."""
    writing: Decomposition | None = None
    for candidate in _candidates(op):
        seen = _seen(candidate, node, mode)
        if seen.has_gradients and not seen.writes:
            return candidate
        if seen.has_gradients and writing is None:
            writing = candidate
    return writing


def _candidates(op: OpOverload) -> Iterator[Decomposition]:
    if op is torch.ops.aten.as_strided.default:
        yield as_read
    if op in DECOMPOSABLE and op in (known := decompositions()):
        yield known[op]
    if op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
        yield op.decompose


class _Seen(TorchDispatchMode):
    """What kind of operators run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_gradients = True
        self.writes = False

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.has_gradients &= func.namespace != "prims"
        self.writes |= schema_of(func).is_mutable
        return func(*args, **(kwargs or {}))


def _seen(decomposition: Decomposition, node: Node, mode: FakeTensorMode) -> _Seen:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    seen = _Seen()
    try:
        with mode, torch.no_grad(), seen:
            ran = decomposition(*args, **kwargs) is not NotImplemented
    except (RuntimeError, TypeError, ValueError):  # it needs values, which no plan has
        ran = False
    seen.has_gradients &= ran
    return seen
