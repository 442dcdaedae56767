"""torch.autograd.Function: one call of the flat program that keeps the backward its author wrote.

Tracing would inline the forward and drop the backward without a word. Instead the call stands in
the program as it is. ``passes/axes/bodies.py`` reads off both bodies along which axes it may be
split; elsewhere its operands are gathered, and announced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ringfx.passes.capture.aliases import storage_of
from ringfx.passes.capture.precision import Autocast, AutocastInterpreter
from ringfx.passes.capture.recorded import as_one_call
from ringfx.passes.capture.regions import trace_below_autograd
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["OwnBackward", "writes_operands"]

_apply = torch.ops.higher_order.autograd_function_apply


class OwnBackward:
    """A function with its own backward, as Dynamo captured both.

    Called while the flat program is traced it records itself as one call; called later (run, or
    traced by the compiler's autograd) it is the function.
    """

    def __init__(
        self,
        forward: GraphModule,
        backward: GraphModule,
        options: Mapping[str, Any],
        autocast: Autocast,
    ) -> None:
        self.forward = forward
        self.backward = backward
        self.options = dict(options)
        self.autocast = autocast
        """Under which it was called: the bodies stand as they are, and are run under it."""
        text = f"{forward.code}{backward.code}{sorted(self.options.items())}"
        text += f"{autocast.states}" if autocast.is_on else ""
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        # torch.fx names a call by these, and ranks compare programs by those names.
        self.__name__ = self.__qualname__ = f"own_backward_{digest}"
        self.__module__ = __name__

    def __repr__(self) -> str:
        return self.__name__  # plans name calls so, and ranks compare plans

    def __call__(self, *operands: Any) -> Any:
        return as_one_call(self, self._call, operands, "own_backward")

    def _call(self, *operands: Any) -> Any:
        with self.autocast.active():
            return _apply(self.forward, self.backward, *operands, **self.options)


def writes_operands(forward: GraphModule, operands: Sequence[Any]) -> bool:
    """Whether a forward changes what it is given, by any of its views."""
    flat = trace_below_autograd(AutocastInterpreter(forward).run, operands)
    given = {storage_of(n.meta.get("val")) for n in flat.graph.nodes if n.op == "placeholder"} - {
        None
    }
    calls = [n for n in flat.graph.nodes if isinstance(n.target, OpOverload)]
    written = [n.args[0] for n in calls if schema_of(n.target).is_mutable and n.args]
    return any(isinstance(w, Node) and storage_of(w.meta.get("val")) in given for w in written)
