"""Where a node comes from: the module path and the source line that a user would recognise."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence

import torch

from ringfx import errors

__all__ = [
    "describe_node", "inlined_call", "input_names", "module_path", "source_line", "stamp_origins",
]  # fmt: skip

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_ROOT = re.compile(r"^[LG]\['([^']*)'\]")
_ARGUMENT = re.compile(r"^L\['args'\]\[(\d+)\]")
_MODULE_ARGUMENT = re.compile(rf"{_ARGUMENT.pattern}(?=\.\w+\b(?!\())")
"""The module itself, of a forward that was wrapped in ``def wrapper(*args)``; a size of a tensor is
a call."""
_ARRAY = re.compile(r"^___from_numpy\((.*)\)$")
"""An array of numpy, which Dynamo makes a tensor of."""
_LEFT = re.compile(r"___stack(\d+)")
_ENTRY = re.compile(r"\['?([^'\]]*)'?\]")
_TORCH = os.path.dirname(torch.__file__)
_DETECT = os.path.join(os.path.dirname(os.path.dirname(__file__)), "detect")
_PACKAGE_CALLS = os.path.join(_DETECT, "package_calls")
_RINGFX = os.path.dirname(errors.__file__)
_NOT_THE_USERS = (_TORCH, _DETECT, os.path.join(_RINGFX, "ops"), os.path.join(_RINGFX, "nn"))
"""Folders whose functions users call: the line of theirs is the one to name."""


def clean_path(text: str) -> str:
    """Dynamo's ``L['self']._modules['model'].layers.0`` as the user's ``model.layers.0``.

    >>> clean_path("L['self']._modules['model'].layers[0]._parameters['weight']")
    'model.layers.0.weight'
    >>> clean_path("L['self'].__dict__['_modules']['qkv'].__dict__['_parameters']['weight']")
    'qkv.weight'
    >>> clean_path("L['args'][0]._modules['model'].layers[1]"), clean_path("G['net'].layers[1]")
    ('model.layers.1', 'net.layers.1')
    >>> clean_path("L['input_ids']"), clean_path("L['args'][0]"), clean_path("L['___stack0']")
    ('input_ids', 'argument 0', 'value 0 before the graph break')
    """
    text = _MODULE_ARGUMENT.sub("", text)
    root = _ROOT.match(text)
    rest = text[root.end() :] if root else text
    rest = _ENTRY.sub(lambda m: f".{m.group(1)}", rest)
    for held in (".__dict__", "._modules", "._parameters", "._buffers"):
        rest = rest.replace(held, "")
    rest = rest.strip(".").removeprefix("_orig_mod.")
    name = root.group(1) if root else ""
    if left := _LEFT.fullmatch(name):
        return f"value {left.group(1)} before the graph break{rest and f', {rest}'}"
    if name in ("self", "kwargs", "fn", ""):
        return rest
    if name == "args":
        return f"argument {rest}"
    return f"{name}.{rest}".strip(".")


def input_names(sources: Sequence[str], parameters: Sequence[str]) -> tuple[str, ...]:
    """What a user calls a program's inputs, of which Dynamo says where it found them.

    ``parameters``: the names of what forward is given by position, where that is known. A forward
    that stands behind ``*args``, which may hold the module itself first, is seen without them.

    >>> input_names(["L['args'][0].layers[1]", "L['args'][1]", "L['args'][2]"], ["x"])
    ('layers.1', 'x', 'argument 1')
    >>> input_names(["L['args'][0].size()[1]", "L['args'][0]"], ["x"])
    ('x.size().1', 'x')
    >>> input_names(["___from_numpy(L['ids'])"], [])
    ('ids',)
    """
    sources = [_ARRAY.sub(r"\1", text) for text in sources]
    first = int(any(_MODULE_ARGUMENT.match(text) for text in sources))

    def named(text: str) -> str:
        found = None if _MODULE_ARGUMENT.match(text) else _ARGUMENT.match(text)
        if found is None:
            return clean_path(text)
        number = int(found[1]) - first
        name = parameters[number] if number < len(parameters) else f"argument {number}"
        return f"{name}.{clean_path(text[found.end() :])}".strip(".")

    return tuple(map(named, sources))


def module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    innermost = list(stack.values())[-1][0]
    return clean_path(innermost)


def source_line(node: torch.fx.Node) -> str:
    """``file.py:line`` of the innermost frame outside torch and ringfx."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [f for f in frames if not f[0].startswith(_NOT_THE_USERS)] or frames
    if not users:
        return ""
    file, line, _ = users[-1]
    return f"{os.path.basename(file)}:{line}"


def inlined_call(node: torch.fx.Node) -> str | None:
    """The call that this operator was inlined from, such as ``flash_attn_func``."""
    if "ringfx_inlined_call" in node.meta:
        return str(node.meta["ringfx_inlined_call"])
    for file, _, function in _FRAME.findall(node.meta.get("stack_trace") or ""):
        if file.startswith(_PACKAGE_CALLS):
            return str(function)
    return None


def stamp_origins(graph: torch.fx.Graph) -> None:
    """Give every node its path and line; a node without takes those of the one before it.

    Code between two modules (residual additions, masks) carries no module of its own.
    """
    path = line = ""
    for node in graph.nodes:
        path = module_path(node) or path
        line = source_line(node) or line
        own = module_path(node)
        node.meta.setdefault("ringfx_path", own if own or node.op != "call_function" else path)
        node.meta.setdefault("ringfx_source", source_line(node) or line)


def describe_node(node: torch.fx.Node) -> str:
    """``layers.3.mlp (model.py:17), aten.cumsum.default`` for messages."""
    path = node.meta.get("ringfx_path") or module_path(node) or "the model's top level"
    line = node.meta.get("ringfx_source") or source_line(node) or "no source line"
    return f"{path} ({line}), {target_name(node.target)}"


def target_name(target: object) -> str:
    """What a node calls, as people write it: ``aten.add.Tensor``, ``operator.getitem``."""
    if inspect.isfunction(target) or inspect.isbuiltin(target):
        return f"{target.__module__.removeprefix('_')}.{target.__qualname__}"
    return str(target)
