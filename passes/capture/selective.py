"""Selective checkpointing: the user's policy, asked about what each call will be lowered to.

A policy speaks of the operators below autograd (``mm``), the flat program of those above it
(``linear``). While a body is traced, ``Asked`` sees what every call becomes, asks the policy about
each, and tags the call with the strongest wish to save. AOTAutograd's partitioner obeys the tags;
gradients do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy

from ringfx.torch_compat.dispatch import CachingMode, TorchDispatchMode
from ringfx.torch_compat.releases import asked_by_policy

__all__ = ["PolicyTags", "policy_of"]

Policy = Callable[..., Any]
_STRENGTH = (
    CheckpointPolicy.PREFER_RECOMPUTE,
    CheckpointPolicy.MUST_RECOMPUTE,
    CheckpointPolicy.PREFER_SAVE,
    CheckpointPolicy.MUST_SAVE,
)


def policy_of(context_fn: Callable[[], Any]) -> Policy | None:
    """The policy that a ``context_fn`` carries; None if it is not selective checkpointing."""
    contexts = context_fn()
    caching = contexts[0] if isinstance(contexts, (tuple, list)) and contexts else None
    return caching.policy_fn if isinstance(caching, CachingMode) else None


class PolicyTags(TorchDispatchMode):
    """Tags the calls of the program that is being traced as the policy wishes."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        mode = get_proxy_mode()
        assert mode is not None, "a policy is asked while a program is traced"
        self._graph: Any = mode.tracer.graph
        self._policy = policy

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in SAC_IGNORED_OPS:
            return result
        wish = self._policy(asked_by_policy(result), func, *args, **kwargs)
        if isinstance(wish, bool):
            wish = CheckpointPolicy.MUST_SAVE if wish else CheckpointPolicy.PREFER_RECOMPUTE
        call = next(iter(reversed(self._graph.nodes)))
        before = call.meta.get("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        call.meta["recompute"] = max(before, wish, key=_STRENGTH.index)
        return result
