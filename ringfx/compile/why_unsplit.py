"""Why a call of an optimized model was not compiled, and so ran whole on every rank."""

from __future__ import annotations

import os

import torch

from ringfx.torch_compat import dynamo
from ringfx.torch_compat.autograd import in_transform, is_scripted
from ringfx.torch_compat.dispatch import active_modes

__all__ = ["why_unsplit"]

_WHOLE = "this call of the model was not compiled and ran unsharded on every rank: "


def why_unsplit() -> str:
    """The true cause, as far as torch tells, and what to do about it."""
    return _WHOLE + next((text for holds, text in _causes() if holds), _UNKNOWN)


def _causes() -> list[tuple[bool, str]]:
    stance = dynamo.stance()
    modes = ", ".join(type(mode).__name__ for mode in active_modes())
    return [
        (
            in_transform(),
            "it is inside a torch.func transform (grad, vmap, jacrev, functional_call under "
            "one), where Dynamo does not trace. Do: call the model outside the transform, or "
            "take the gradient with backward().",
        ),
        (
            stance != "default",
            f"torch.compiler.set_stance({stance!r}) turns compilation off. Do: keep the stance "
            "'default' around calls of the model.",
        ),
        (
            os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1" or dynamo.config.disable,
            "compilation is turned off (TORCH_COMPILE_DISABLE=1 or TORCHDYNAMO_DISABLE=1 or "
            "torch._dynamo.config.disable). Do: turn it on.",
        ),
        (
            bool(modes),
            f"a torch dispatch mode is active ({modes}), under which Dynamo does not trace. Do: "
            "leave the mode before you call the model.",
        ),
        (
            is_scripted() or torch.compiler.is_exporting(),
            "torch.jit.trace or torch.export traces it. Do: trace the original model, which "
            "ringfx.optimize was given.",
        ),
    ]


_UNKNOWN = (
    "Dynamo skipped its code for a reason that ringfx does not know (for example, forward is in "
    "a file that Dynamo skips, such as FullyShardedDataParallel's). Do: set TORCH_LOGS=dynamo to "
    "see the reason; shard with fully_shard; or put your own part into a module and optimize "
    "that module."
)
