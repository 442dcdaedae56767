"""In-place operators become functional ones, so that a value never changes after it was made."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.origin import describe_node

__all__ = ["functionalize"]


def functionalize(gm: torch.fx.GraphModule) -> None:
    """Replace each in-place operator on a value that nothing else aliases.

    Raises
    ------
    CaptureRefused
        When the written value is an input, a buffer, or shares memory with another live value.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            _replace(gm, node, order)
    gm.graph.lint()


def _replace(
    gm: torch.fx.GraphModule, node: torch.fx.Node, order: dict[torch.fx.Node, int]
) -> None:
    written = node.args[0]
    functional = _functional_counterpart(node.target)
    if functional is None or not isinstance(written, torch.fx.Node):
        _refuse(node, "it has no functional counterpart")
        return
    if written.op in ("placeholder", "get_attr"):
        _refuse(node, f"it writes into {written.name}, an input or buffer of the model")
    shared = [n.name for n in _aliases(written) if _used_after(n, node, order)]
    if shared:
        _refuse(node, f"what it writes into is also seen through {', '.join(shared)}")
    node.target = functional
    later = [u for u in written.users if u is not node and order.get(u, -1) > order[node]]
    for user in later:
        user.replace_input_with(written, node)


def _functional_counterpart(op: object) -> OpOverload | None:
    assert isinstance(op, OpOverload), op
    packet_name = op._schema.name.split("::")[1]
    namespace = op.namespace
    if not packet_name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), packet_name.rstrip("_"), None)
    found: OpOverload | None = getattr(packet, op._overloadname, None) if packet else None
    return found


def _views_of(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Users of the node whose result may share its memory."""
    return [
        user
        for user in node.users
        if isinstance(user.target, OpOverload)
        and any(
            r.alias_info is not None and not r.alias_info.is_write
            for r in user.target._schema.returns
        )
        and user.args
        and user.args[0] is node
    ]


def _aliases(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Every other value that may share memory with this one."""
    base = node
    while (
        isinstance(base.target, OpOverload)
        and any(r.alias_info is not None for r in base.target._schema.returns)
        and isinstance(base.args[0], torch.fx.Node)
    ):
        base = base.args[0]
    found, stack = [], [base]
    while stack:
        current = stack.pop()
        if current is not node:
            found.append(current)
        stack.extend(_views_of(current))
    return found


def _used_after(
    value: torch.fx.Node, write: torch.fx.Node, order: dict[torch.fx.Node, int]
) -> bool:
    if value.op in ("placeholder", "get_attr"):
        return True
    return any(order.get(u, -1) > order[write] for u in value.users if u is not write)


def _refuse(node: torch.fx.Node, reason: str) -> None:
    raise CaptureRefused(
        f"{describe_node(node)}: this operator writes in place and {reason}. "
        "Do: use the out-of-place form (x = x + y instead of x += y)."
    )
