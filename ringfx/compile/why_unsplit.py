"""Why a call of an optimized model was not compiled, and so ran whole on every rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from ringfx.passes.capture.breaks import without_addresses
from ringfx.torch_compat import dynamo
from ringfx.torch_compat.autograd import in_transform, is_scripted
from ringfx.torch_compat.dispatch import active_modes

__all__ = ["Refusals", "why_unsplit"]

_WHOLE = "this call of the model was not compiled and ran unsharded on every rank: "


class Refusals:
    """What Dynamo says where it gives up code, over the calls of one model."""

    def __init__(self) -> None:
        self.texts: tuple[str, ...] = ()
        """Of the last call in which it said something: it skips the same code in silence later."""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """One call of the model."""
        before = dynamo.refusals()
        yield
        now = dynamo.refusals()
        self.texts = tuple(t for t, n in now.items() if n > before.get(t, 0)) or self.texts


def why_unsplit(refused: Sequence[str] = ()) -> str:
    """The true cause, as far as torch tells, and what to do about it.

    Parameters
    ----------
    refused
        What Dynamo said of the code that it gave up in this call.
    """
    rest = _refused(refused) if refused else _UNKNOWN
    return _WHOLE + next((text for holds, text in _causes() if holds), rest)


def _refused(texts: Sequence[str]) -> str:
    """Dynamo's first lines: the kind and its explanation, without hints about Dynamo itself."""
    each = dict.fromkeys(without_addresses(_kind_and_explanation(text)) for text in texts)
    said = "; ".join(each)
    return (
        f"Dynamo does not trace its code: {said}. Do: put the part of the model that holds the "
        "attention into a module of its own, and give that to ringfx.optimize."
    )


def _kind_and_explanation(text: str) -> str:
    kind, *rest = [line.strip() for line in text.strip().splitlines()]
    told = next((line for line in rest if line.startswith("Explanation: ")), "")
    return f"{kind} ({told.removeprefix('Explanation: ').rstrip('.')})" if told else kind


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
