"""Dynamo as ringfx uses it around a program: loading this module loads Dynamo.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch._dynamo
import torch.utils.checkpoint
from torch._dynamo import callback, convert_frame, eval_frame, exc, source, trace_rules
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import counters

__all__ = [
    "COMPILER_MODULE", "ENTRY_MODULE", "BackendCompilerFailed", "CallbackArgs",
    "CatchErrorsWrapper", "GradSource", "OptimizedModule", "TensorifyScalarRestartAnalysis",
    "TensorifyState", "TorchDynamoException", "aot_eager", "callback_handler", "config",
    "graph_break", "is_output", "kept_as_calls", "not_started", "refusals", "replace_checkpoint",
    "skips", "stance", "unimplemented", "watching_compiler",
]  # fmt: skip

config = torch._dynamo.config
"""Limits of recompilation and how regions are handed over. Without: models of many lengths."""

graph_break = torch._dynamo.graph_break
"""Ends a program with a reason. Without: packages' functions in forms that ringfx gives up."""

OptimizedModule = eval_frame.OptimizedModule
"""What ``torch.compile(module)`` returns. Without: refusing it by name."""

BackendCompilerFailed = exc.BackendCompilerFailed
"""What Dynamo makes of a backend's error. Without: errors of ringfx arrive inside others."""

TorchDynamoException = exc.TorchDynamoException
"""Base of Dynamo's errors. Without: its errors are reported as defects of ringfx."""

unimplemented = exc.unimplemented
"""Ends a program from inside Dynamo, with a reason. Without: log lines that cannot wait."""

TensorifyScalarRestartAnalysis = exc.TensorifyScalarRestartAnalysis
"""Asks Dynamo to trace again; ``TensorifyState`` says with which numbers. Without: floats of a
model that is compiled with ``dynamic=True``."""

GradSource = source.GradSource
"""An input that is a parameter's gradient. Without: whole training steps that are compiled."""

CatchErrorsWrapper = convert_frame.CatchErrorsWrapper
"""Where Dynamo takes a frame. Without: the limits above, under ``backend="ringfx"``."""

callback_handler = callback.callback_handler
"""Tells of the start of every compilation. Without: packages that are imported later."""

CallbackArgs = callback.CallbackArgs
"""What it is told with."""

ENTRY_MODULE = eval_frame.__name__
"""Module of the frame in which compiled code is entered. Without: where a graph broke."""

COMPILER_MODULE = convert_frame.__name__
"""Module of the frame of the compiler. Without: where a graph broke."""


def is_output(code: Any) -> bool:
    """Whether Dynamo has made this code. Without: which function around a program runs as it is."""
    return code in convert_frame.output_codes


def skips(function: Any) -> bool:
    """Whether Dynamo starts no program in this function's file. Without: roots of torch.nn."""
    return bool(trace_rules.check(function))


def not_started(code: CodeType) -> None:
    """Dynamo starts no program at this code, and inlines it where a program calls it. Without:
    sharded parameters in uncompiled code."""
    eval_frame.skip_code(code)


@contextlib.contextmanager
def kept_as_calls(*functions: Callable[..., Any]) -> Iterator[None]:
    """Inside, programs hold calls of them, and Dynamo does not look into them. Without:
    ``Tensor.unflatten`` ends programs under ``torch.set_default_device``, as it calls ``super``."""
    kept = trace_rules._allowed_callable_ids
    new = [id(f) for f in functions if id(f) not in kept]
    for number in new:
        kept.add(number)
    try:
        yield
    finally:
        for number in new:
            kept.remove(number)


def watching_compiler() -> Any:
    """What Dynamo compiles with whatever is called now; None where it is off. Without: checkpoints
    in code that runs uncompiled."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() or None


def replace_checkpoint(around: Callable[..., Any]) -> None:
    """Where no program holds it, ``checkpoint(...)`` is ``around(usual, ...)`` from now on.

    It is decorated so that what it runs is not compiled, and keeps that in an attribute. Without:
    checkpoints in code that runs uncompiled are whole on every rank.
    """
    plain: Any = inspect.unwrap(torch.utils.checkpoint.checkpoint)
    usual = torch._dynamo.disable(plain)
    setattr(plain, "__dynamo_disable", functools.partial(around, usual))


def stance() -> str:
    """What ``set_stance`` was told. Without: naming it where a call ran unsplit."""
    return str(eval_frame._stance.stance)


def refusals() -> Mapping[str, int]:
    """How often Dynamo has given up in this process, by its text. Without: naming the reason where
    a call ran unsplit."""
    return dict(counters["unimplemented"])


def aot_eager(
    gm: torch.fx.GraphModule,
    inputs: list[Any],
    change: Callable[[torch.fx.Graph], None],
    change_joint: Callable[[torch.fx.Graph], None],
) -> Any:
    """Autograd traced, operators run one by one; ``change`` is made to forward and to backward,
    ``change_joint`` to both together. Without: ``compiler="aot_eager"``."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def parted(joint: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        change_joint(joint.graph)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    def compiled(part: torch.fx.GraphModule, given: list[Any]) -> Any:
        change(part.graph)
        return boxed_nop(part, given)

    compile_with_autograd = aot_autograd(
        fw_compiler=compiled, bw_compiler=compiled, partition_fn=parted,
        keep_inference_input_mutations=True,
    )  # fmt: skip
    return compile_with_autograd(gm, inputs)
