"""What is told after every pass: its seconds; with ``RINGFX_DUMP``, the program as a text file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from ringfx.comm.world import World
from ringfx.errors import InvalidArgument
from ringfx.passes.capture.origin import target_name
from ringfx.watch.stages import stage_done

__all__ = ["AfterPass", "program_text"]

VARIABLE = "RINGFX_DUMP"
"""A folder; nothing is written where it is not set."""
LONGEST_TEXT = 60
"""A longer text among the arguments is cut, such as a mask's expression."""

_PROGRAMS = itertools.count(1)

Note = Callable[[Node], str]


class AfterPass:
    """One program on its way through the passes."""

    def __init__(self, world: World) -> None:
        given = os.environ.get(VARIABLE)
        self._folder = Path(given) if given else None
        self._rank = world.rank
        self._program = next(_PROGRAMS) if self._folder else 0
        self._passes = itertools.count(1)
        self.input_names: Sequence[str] = ()
        """Of the program, once they are known."""

    def __call__(
        self, name: str, graph: Graph, note: Note = lambda node: "", *, stage: str = ""
    ) -> None:
        """After the pass ``name``; ``stage`` is its word in the line of seconds."""
        if stage:
            stage_done(stage)
        if self._folder is None:
            return
        place = f"program{self._program}-rank{self._rank}-{next(self._passes):02d}-{name}.txt"
        title = f"# rank {self._rank}, program {self._program}, after {name}\n"
        text = title + program_text(graph, note, self.input_names)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / place).write_text(text)
        except OSError as problem:
            raise InvalidArgument(
                f"{VARIABLE}={self._folder}: programs cannot be written there: {problem.strerror}. "
                "Do: name a folder that you may write; it is made if it is not there."
            ) from problem


def program_text(
    graph: Graph, note: Note = lambda node: "", input_names: Sequence[str] = ()
) -> str:
    """A line for each value: what it is, its shape, what ``note`` says, and where it comes from."""
    names = dict(zip(graph.find_nodes(op="placeholder"), input_names, strict=False))
    lines = [(_call(n), _shape(n), note(n), _where(n, names.get(n, ""))) for n in graph.nodes]
    widths = [min(90, max((len(line[i]) for line in lines), default=0)) for i in range(3)]
    return "".join(
        "  ".join((*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[3])).rstrip()
        + "\n"
        for line in lines
    )


def _call(node: Node) -> str:
    if node.op == "output":
        return f"return {_shown(node.args[0])}"
    if node.op in ("placeholder", "get_attr"):
        return f"{node.name} = input"
    given = [_shown(x) for x in node.args]
    given += [f"{name}={_shown(x)}" for name, x in node.kwargs.items()]
    return f"{node.name} = {target_name(node.target)}({', '.join(given)})"


def _shown(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST_TEXT else f"{value[:LONGEST_TEXT]}...")
    return str(value)


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(
        f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        for x in values
        if isinstance(x, torch.Tensor)
    )


def _where(node: Node, name: str) -> str:
    path = name or node.meta.get("ringfx_path") or ""
    source = node.meta.get("ringfx_source") or ""
    found = ", ".join(x for x in (path, source) if x)
    return f"# {found}" if found else ""
