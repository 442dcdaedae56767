"""Landmarks: a mean of each segment of tokens, which stands for them, as in Nystrom's attention.

They are a part of the tokens' axis, and meet the tokens and one another in products. There are few
of them: every rank is to have all, so that tokens stay split beside them. A *reshard* that ends
their axis is put behind the means.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from ringfx.comm.redistribute import reshard
from ringfx.ops import attention
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import Call
from ringfx.passes.axes.space import Dim
from ringfx.passes.normalize.graph_editor import GraphEditor
from ringfx.passes.token_axes.token_line import Lines

__all__ = ["end_landmarks"]

aten = torch.ops.aten
PRODUCTS = frozenset(
    {attention, aten.einsum.default, aten.matmul.default, aten.bmm.default}
)  # fmt: skip
MEANS = frozenset({aten.mean.dim, aten.sum.dim_IntList, aten.amax.default})


def end_landmarks(graph: Graph, axes: AxisMap, lines: Lines) -> bool:
    """Whether there were any."""
    landmarks, editor = _landmarks(axes, lines), GraphEditor(graph, axes, lines)
    for node in list(axes.ops) if landmarks else ():
        if node.target not in MEANS:
            continue
        given = axes.dims(Call(node).operands[0])
        for d, axis in enumerate(axes.dims(node)):
            if axis in landmarks and axis in given:
                new = editor.make(node.next, reshard, node, d, True)
                new.meta |= {k: v for k, v in node.meta.items() if k != "val"}
                for user in [u for u in node.users if u is not new]:
                    user.replace_input_with(node, new)
                editor.changed = True
    return editor.changed


def _landmarks(axes: AxisMap, lines: Lines) -> set[Dim]:
    parts, met = set[Dim](), set[Dim]()
    for node, named in axes.ops.items():
        if node.target not in PRODUCTS:
            continue
        given = [n for n in named.call.operands if lines.token_dim(n) is not None]
        dims = [dim for n in given for dim in axes.dims(n)]
        parts |= {a for a in dims if a and any(set(a) < set(b) for b in dims)}
        made = axes.dims(node)
        met |= {a for a in made if made.count(a) > 1}
    return parts & met
