"""Where a node comes from: the module path and the source line that a user would recognise."""

from __future__ import annotations

import os
import re

import torch

__all__ = ["describe_node", "module_path", "source_line", "stamp_origins"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_ROOT = re.compile(r"^L\['[^']*'\]\.?")
_MODULES_ENTRY = re.compile(r"\._modules\['([^']*)'\]|_modules\['([^']*)'\]")
_TORCH = os.path.dirname(torch.__file__)


def clean_path(text: str) -> str:
    """Dynamo's ``L['self']._modules['model'].layers.0`` as the user's ``model.layers.0``."""
    text = _ROOT.sub("", text)
    text = _MODULES_ENTRY.sub(lambda m: "." + (m.group(1) or m.group(2) or ""), text)
    text = re.sub(r"\._(?:parameters|buffers)\['([^']*)'\]", r".\1", text)
    text = re.sub(r"\['?([^'\]]*)'?\]", r".\1", text)
    return text.strip(".").removeprefix("_orig_mod.")


def module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    innermost = list(stack.values())[-1][0]
    return clean_path(innermost)


def source_line(node: torch.fx.Node) -> str:
    """``file.py:line`` of the innermost frame outside torch."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [f for f in frames if not f[0].startswith(_TORCH)] or frames
    if not users:
        return ""
    file, line, _ = users[-1]
    return f"{os.path.basename(file)}:{line}"


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
    return f"{path} ({line}), {node.target}"
