"""Calls of attention kernels become ``scaled_dot_product_attention``, in the program itself.

A call is replaced by a plain function of its operands, traced on their fake values. The program
computes the same; what follows has one form to read. A call without a plain form stays, with the
reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.passes.axes.call import Call
from ringfx.passes.capture.gradients import needs_grad
from ringfx.torch_compat.fake_tensors import FakeTensorMode
from ringfx.torch_compat.operators import schema_of

__all__ = ["KernelCall", "inline", "inline_kernel_calls"]

KernelCall = Callable[..., torch.Tensor]
"""Takes a call's arguments by the names of its schema and returns its first result.

Raises ValueError, with the reason, if plain SDPA cannot compute the same."""


def inline_kernel_calls(
    graph: torch.fx.Graph, plain_form_of: Callable[[Node], KernelCall | None]
) -> dict[Node, str]:
    """Rewrite every call that has a plain form; returns the reason for each that has to stay."""
    refused: dict[Node, str] = {}
    for node in list(graph.nodes):
        plain_form = plain_form_of(node)
        if plain_form is None:
            continue
        reason = _others_used(node) or _replace(node, plain_form)
        if reason is not None:
            refused[node] = reason
    return refused


def _others_used(node: Node) -> str | None:
    """Why a result beside the first keeps the call from being rewritten."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return None
    for user in node.users:
        if user.target is not operator.getitem:
            return "its results are used together"
        if user.args[1] != 0 and user.users:
            names = schema_of(node.target).returns
            name = names[user.args[1]].name or f"result {user.args[1]}"  # type: ignore[index]
            return f"its {name} is used, which a split attention does not return"
    return None


def _replace(node: Node, plain_form: KernelCall) -> str | None:
    arguments = Call(node).arguments
    try:
        made = inline(node, lambda **given: plain_form(**given), **arguments)
    except ValueError as error:
        return str(error)
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        node.replace_all_uses_with(made)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(made)
            node.graph.erase_node(user)
    node.graph.erase_node(node)
    return None


def inline(
    node: Node, function: Callable[..., torch.Tensor], *, named: bool = True, **arguments: Any
) -> Node:
    """What ``function(**arguments)`` computes, as nodes before ``node``; arguments hold nodes.

    ``named``: what is found in them is said to be found by the name of the call.
    """
    names = [n for n, v in arguments.items() if isinstance(v, Node)]
    operands = [arguments[n] for n in names]
    fakes = [n.meta["val"] for n in operands]
    fixed = {n: v for n, v in arguments.items() if n not in names}

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return function(**dict(zip(names, tensors, strict=True)), **fixed)

    with _mode(fakes), torch.enable_grad():
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    places = traced.graph.find_nodes(op="placeholder")
    copied: dict[Node, Any] = dict(zip(places, operands, strict=True))
    with node.graph.inserting_before(node):
        for old in traced.graph.nodes:
            if old.op == "output":
                break
            if old not in copied:
                copied[old] = _copy(node, old, copied)
                if not named:
                    del copied[old].meta["ringfx_inlined_call"]
    (result,) = traced.graph.output_node().args
    made: Node = copied[result]  # type: ignore[index]
    return made


def _copy(origin: Node, old: Node, copied: Mapping[Node, Any]) -> Node:
    """A traced node in the program; it comes from where the call came from."""
    new = origin.graph.node_copy(old, copied.__getitem__)
    kept = {k: v for k, v in origin.meta.items() if k not in ("val", "tensor_meta")}
    new.meta = kept | {"val": old.meta["val"], "ringfx_inlined_call": _name(origin)}
    floating = isinstance(old.meta["val"], torch.Tensor) and old.meta["val"].is_floating_point()
    new.meta["ringfx_needs_grad"] = floating and any(needs_grad(n) for n in new.all_input_nodes)
    return new


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").removesuffix(".default")


def _mode(values: list[Any]) -> FakeTensorMode:
    mode: FakeTensorMode = values[0].fake_mode
    return mode
