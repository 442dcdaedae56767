"""Python floats that Dynamo hands over as tensors become numbers again.

With ``dynamic=True`` (or a float that changed between two calls) Dynamo makes an epsilon or a
temperature a scalar tensor, so that one program serves all its values, and reads it back by
``item()``. The passes here read such arguments, so Dynamo is asked to trace again with the float as
it is; another value then compiles another program, as another sequence length does.
"""

from __future__ import annotations

import torch

from ringfx.torch_compat.dynamo import TensorifyScalarRestartAnalysis, TensorifyState
from ringfx.torch_compat.fake_tensors import FakeTensor, symbol_name

__all__ = ["specialize_floats"]


def specialize_floats(gm: torch.fx.GraphModule) -> None:
    """Makes Dynamo trace again where a float came as a tensor; returns where none did."""
    found = [name for n in gm.graph.nodes if (name := _float_symbol(n)) is not None]
    new = [name for name in found if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def _float_symbol(node: torch.fx.Node) -> str | None:
    """The name under which Dynamo knows a float, if this placeholder is one."""
    value = node.meta.get("example_value")
    if node.op != "placeholder" or not isinstance(value, FakeTensor):
        return None
    if not all(user.target == "item" for user in node.users):
        return None
    return symbol_name(value)
