"""Where Dynamo stopped compiling: in the program's own frame, or in one that called it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import FrameType

import torch

from ringfx.torch_compat.dynamo import COMPILER_MODULE, ENTRY_MODULE, GradSource, is_output

__all__ = [
    "graph_break", "is_outermost", "reads_gradients", "uncompiled_caller", "without_addresses",
]  # fmt: skip


def graph_break(gm: torch.fx.GraphModule) -> str | None:
    """The user frame that ended this program early, and why."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frames = [f"{f.filename}:{f.lineno}, in {f.name}" for f in reason.user_stack]
    where = frames[-1] if frames else "an unknown frame"
    return f"{where}: {_in_one_line(reason.reason)}"


def _in_one_line(reason: str) -> str:
    """What the user's own graph_break() says, or the title that Dynamo gives."""
    said = re.search(r"User-inserted graph break. Message: (?!None)(.+)", reason)
    if said:
        return said.group(1)
    return without_addresses(reason.strip().splitlines()[0]) if reason.strip() else "graph break"


def without_addresses(text: str) -> str:
    """What Dynamo says, with functions by their names: an address says nothing to a reader, and
    differs from rank to rank.

    >>> without_addresses("cannot call <function norm at 0x7f1c2a> of <Cache object at 0x7f>")
    'cannot call norm of <Cache object>'
    """
    text = re.sub(r"<(?:bound |built-in )?(?:function|method) (\S+)[^<>]* at 0x\w+>", r"\1", text)
    return re.sub(r" at 0x\w+", "", text)


def reads_gradients(gm: torch.fx.GraphModule) -> bool:
    """Whether the program is given gradients: it is what follows backward, not the model.

    A whole step that is compiled (backward, clipping, the optimizer) ends programs at backward;
    after it come programs on parameters and gradients, which are complete on every rank.
    """
    sources = (getattr(n.meta.get("grapharg"), "source", None) for n in _placeholders(gm))
    return any(
        isinstance(source, GradSource) or getattr(source, "member", None) == "grad"
        for source in sources
    )


def _placeholders(gm: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    return (n for n in gm.graph.nodes if n.op == "placeholder")


def is_outermost() -> bool:
    """Whether the program being compiled is the model itself, and not a function that it calls."""
    return next(_callers(), None) is None


def uncompiled_caller() -> str | None:
    """The user frame that runs as ordinary Python and calls the program being compiled.

    Dynamo skips a frame with a break inside a loop and compiles what that frame calls.
    """
    for frame in _callers():
        if not is_output(frame.f_code):
            code = frame.f_code
            return f"{code.co_filename}:{frame.f_lineno}, in {code.co_name}"
    return None


def _callers() -> Iterator[FrameType]:
    """User frames that run between the entry into compiled code and its compiler, inner first."""
    frame: FrameType | None = sys._getframe()
    found: list[FrameType] = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == ENTRY_MODULE and frame.f_code.co_name == "compile_wrapper":
            yield from found
            return
        if module == COMPILER_MODULE or module.startswith("ringfx.compile."):
            found.clear()  # what the compiler itself calls: contextlib, the standard library
        elif module.partition(".")[0] not in ("torch", "ringfx"):
            found.append(frame)
        frame = frame.f_back
