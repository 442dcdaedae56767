"""What in-place operators become: code that can be written for every one of them."""

from __future__ import annotations

import keyword

import pytest
import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule

from ringfx.passes.capture.overloads import arguments_for, functional_overload


def named_like_keywords() -> list[OpOverload]:
    """Every in-place operator of torch that has an argument which Python code cannot name."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        operator, _, overload = rest.partition(".")
        if space != "aten" or not operator.endswith("_") or operator.startswith("_"):
            continue
        op = getattr(getattr(torch.ops.aten, operator), overload or "default")
        if any(keyword.iskeyword(a.name) for a in op._schema.arguments):
            found.append(op)
    return found


@pytest.mark.parametrize("op", named_like_keywords(), ids=str)
@pytest.mark.parametrize("defaults", [True, False])
def test_its_functional_form_can_be_written_as_code(op: OpOverload, defaults: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    needed = [a for a in op._schema.arguments[1:] if not a.kwarg_only]
    given = [n for n, a in enumerate(needed, 1) if not (defaults and a.has_default_value())]
    node = graph.call_function(op, (x, *given))
    function = functional_overload(op)
    if keyword.iskeyword(op._overloadname.rstrip("_")):  # capture refuses it by name
        assert function is None
        return
    assert function is not None
    args, kwargs = arguments_for(function, node)
    graph.output(graph.call_function(function, args, kwargs))
    graph.erase_node(node)
    drawn = GraphModule(torch.nn.Module(), graph)(torch.empty(5))
    assert drawn.shape == (5,)
