"""A program as text for tests: one line a value, its shape, and what a pass says of it."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["graph_text", "names_in", "same_text"]

LONG = 30
"""A longer text among the arguments is cut."""
HIDDEN = frozenset({
    "device", "group", "kernels", "layout", "name", "pin_memory", "spec", "strategy",
})  # fmt: skip
"""Arguments that are shown where they are asked for only."""

TYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.int64: "i64", torch.bool: "bool",
}  # fmt: skip


def names_in(graph: Graph) -> dict[Node, str]:
    """``in0``, ``in1`` for inputs and ``v0``, ``v1`` for what is computed, in program order."""
    inputs, values = itertools.count(), itertools.count()
    return {
        n: f"in{next(inputs)}" if n.op in ("placeholder", "get_attr") else f"v{next(values)}"
        for n in graph.nodes
        if n.op != "output"
    }


def graph_text(
    graph: Graph,
    note: Callable[[Node], str] = lambda node: "",
    *,
    show: Collection[str] = (),
    shapes: bool = True,
) -> str:
    """A line for each value: ``v0 = linear(in1, in0)  f32[1, 6, 24]``, and what ``note`` says.

    Names that torch gives are not shown, nor are overloads, ``HIDDEN`` and lines of source.
    """
    names = names_in(graph)
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append((f"return {_shown(node.args[0], names)}", "", ""))
            continue
        is_input = node.op in ("placeholder", "get_attr")
        call = "" if is_input else f" = {_target(node.target)}({_arguments(node, names, show)})"
        value = node.meta.get("val", node.meta.get("example_value"))
        lines.append((names[node] + call, _shape(value) if shapes else "", note(node)))
    width = max(len(left) for left, _, _ in lines)
    middle = max(len(shape) for _, shape, _ in lines)
    return "\n".join(f"{a:{width}}  {b:{middle}}  {c}".rstrip() for a, b, c in lines)


def same_text(found: str, expected: str) -> None:
    """Asserts it line by line, whatever ``expected`` is indented by."""
    assert found.splitlines() == textwrap.dedent(expected).strip("\n").splitlines(), f"\n{found}\n"


def _target(target: Any) -> str:
    """``linear`` of aten, ``attention`` of ringfx, ``view`` of a method; no overloads."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        name: str = str(target.name()).split("::")[1]
        return name.removesuffix(f".{target._overloadname}")
    return str(target.__name__)


def _arguments(node: Node, names: dict[Node, str], show: Collection[str]) -> str:
    given = [_shown(x, names) for x in node.args]
    kwargs = {name: x for name, x in node.kwargs.items() if name in show or name not in HIDDEN}
    given += [f"{name}={_shown(x, names)}" for name, x in kwargs.items()]
    return ", ".join(given)


def _shown(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, list | tuple):
        inside = ", ".join(_shown(x, names) for x in value)
        return f"[{inside}]"
    if isinstance(value, torch.dtype):
        return TYPES.get(value, str(value))
    if isinstance(value, str):
        text = re.sub(r"\.py:\d+", ".py", value)
        return repr(text if len(text) <= LONG else f"{text[:LONG]}...")
    return str(value)


def _shape(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_shape, value)) + ")"
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{TYPES.get(value.dtype, value.dtype)}{list(value.shape)}"
