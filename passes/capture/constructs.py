"""Program constructs that tracing alone would lose: carried here, or refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.flex import flex_attention
from ringfx.passes.capture.gradient_hooks import HOOK, hooked
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.own_backward import OwnBackward, writes_operands
from ringfx.passes.capture.placed import PlacedCalls, PlacedValue, has_placed
from ringfx.passes.capture.precision import Autocast, AutocastInterpreter, autocast_off
from ringfx.passes.capture.regions import REGION, flatten_region
from ringfx.passes.capture.selective import PolicyTags, policy_of
from ringfx.torch_compat.distributed import placed
from ringfx.torch_compat.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from ringfx.torch_compat.operators import HigherOrderOperator

__all__ = ["INLINED", "REFUSED", "Inliner", "refuse_unsupported"]

INLINED = frozenset({"tag_activation_checkpoint", "wrap", "invoke_subgraph", "wrap_with_autocast"})
"""Higher-order operators whose body is run in place."""

REFUSED: Mapping[str, str] = {
    "cond": "torch.cond: data-dependent control flow. Do: move the branch out of the model.",
    "while_loop": "torch.while_loop. Do: unroll the loop.",
    "scan": "a scan (recurrence along an axis). Do: leave this module out of ringfx.optimize.",
    "triton_kernel_wrapper_mutation": (
        "a hand-written Triton kernel. Do: wrap it with torch.library.triton_op."
    ),
}
"""Higher-order operators that are refused, each with what to do instead."""


def refuse_unsupported(gm: torch.fx.GraphModule) -> None:
    """Raise for the first construct that capture would change the meaning of."""
    for module in [gm, *(m for m in gm.modules() if m is not gm)]:
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            reason = _reason(node)
            if reason is not None:
                raise CaptureRefused(f"{describe_node(node)}: the program contains {reason}")


def _reason(node: torch.fx.Node) -> str | None:
    if node.op != "call_function":
        return None
    if isinstance(node.target, HigherOrderOperator):
        name = node.target.name()
        if name in INLINED or name in ("flex_attention", "autograd_function_apply", HOOK):
            return None
        return REFUSED.get(
            name,
            f"the higher-order operator {name!r}, for which ringfx has no rule. Do: keep the code "
            "that makes it out of the compiled model with torch.compiler.disable.",
        )
    return None


class Inliner(AutocastInterpreter):
    """Runs Dynamo's graph and, in place, the bodies of the higher-order operators in INLINED.

    Nodes of a checkpointed body are tagged as AOTAutograd's partitioner reads it, so that
    activation checkpointing keeps its meaning: the body is recomputed in backward.
    """

    def __init__(
        self,
        gm: torch.fx.GraphModule,
        region: int | None = None,
        *,
        on_placed: PlacedCalls | None = None,
    ) -> None:
        super().__init__(gm)
        self._region = region
        self._on_placed = on_placed
        self._regions = 0
        self._where = ""
        self._node: torch.fx.Node | None = None

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().placeholder(target, args, kwargs)
        if self._on_placed is None or self._node is None or isinstance(value, PlacedValue):
            return value
        stated = placed(self._node.meta.get("example_value"))
        return value if stated is None else PlacedValue(value, stated)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, HigherOrderOperator):
            return self._inline(target.name(), args, kwargs)
        if self._is_placed(args, kwargs):
            return self._on_parts(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_placed(args, kwargs):
            return self._on_parts(target, args, kwargs)
        return super().call_method(target, args, kwargs)

    def _is_placed(self, args: Any, kwargs: Any) -> bool:
        if self._on_placed is None or self._node is None:
            return False
        return has_placed(self._node, args, kwargs)

    def _on_parts(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._node is not None
        assert self._on_placed is not None
        return self._on_placed(self._node, target, args, kwargs)

    def _inner(self, body: torch.fx.GraphModule, region: int | None) -> Inliner:
        return Inliner(body, region, on_placed=self._on_placed)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        body = self.fetch_attr(target)
        assert isinstance(body, torch.fx.GraphModule), f"{target} is {type(body)}"
        if REGION in target:
            body = flatten_region(body, args)
            with autocast_off():  # the region was traced below it
                return self._inner(body, self._region).run(*args)
        return self._inner(body, self._region).run(*args)

    def run_node(self, n: torch.fx.Node) -> Any:
        self._where, self._node = describe_node(n), n
        if self._region is not None and n.op in ("call_function", "call_method"):
            n.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            n.meta["ac_graph_id"] = self._region
        try:
            return super().run_node(n)
        except DataDependentOutputException as unknown:
            raise CaptureRefused(
                f"{self._where}: a size or a number is read from tensor values, which are unknown "
                "during compilation. Do: give it as a Python number (.tolist())."
            ) from unknown
        except DynamicOutputShapeException as unknown:
            raise CaptureRefused(
                f"{self._where}: the shape of its result depends on tensor values, which are "
                "unknown during compilation. Do: compute it outside of the compiled model "
                "(torch.compiler.disable)."
            ) from unknown

    def _inline(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "flex_attention":
            return flex_attention(*args, **kwargs)
        if name == "autograd_function_apply":
            return self._own_backward(args, kwargs)
        if name == HOOK:
            x, function, *captured = args
            return hooked(x, function, captured)
        if name == "wrap_with_autocast":
            device, dtype, enabled, _cache, body, *operands = args
            with Autocast.now().entered(device, dtype, enabled).active():
                return self._inner(body, self._region).run(*operands)
        if name == "invoke_subgraph":
            body, _identifier, *operands = args
        else:
            body, *operands = args
        region = self._region
        if name == "tag_activation_checkpoint":
            self._regions += 1
            region = self._regions if region is None else region
            with self._asked(body.meta.get("_checkpoint_context_fn")):
                return self._inner(body, region).run(*operands)
        return self._inner(body, region).run(*operands)

    def _asked(self, context_fn: Any) -> contextlib.AbstractContextManager[Any]:
        """Under the user's policy of what a checkpoint saves, where there is one."""
        if context_fn is None:
            return contextlib.nullcontext()
        policy = policy_of(context_fn)
        if policy is None:
            raise CaptureRefused(
                f"{self._where}: torch.utils.checkpoint is given a context_fn that is not "
                "selective checkpointing. Do: make it with create_selective_checkpoint_contexts."
            )
        return PolicyTags(policy)

    def _own_backward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward, backward, *operands = args
        if self._is_placed(args, kwargs):
            raise CaptureRefused(
                f"{self._where}: a torch.autograd.Function takes or makes a DTensor, for which "
                "ringfx has no rule. Do: give it plain tensors (to_local())."
            )
        if kwargs.get("dirty_idx") or writes_operands(forward, operands):
            raise CaptureRefused(
                f"{self._where}: a torch.autograd.Function writes into its inputs. "
                "Do: let it return a new tensor."
            )
        return OwnBackward(forward, backward, kwargs, Autocast.now())(*operands)
