"""Messages over other ranks than the sequence's, such as those of tensor parallelism."""

from __future__ import annotations

from ringfx.passes.axes.call import AxisRule, Call, OpAxes
from ringfx.passes.axes.rules.pattern import shares
from ringfx.passes.axes.rules.pointwise import elementwise
from ringfx.passes.axes.rules.views import numbered
from ringfx.passes.capture import parallel_calls

__all__ = ["RULES"]


def resized(call: Call) -> OpAxes:
    """Other ranks' parts along ``dim`` are joined, or a part is taken: all else stays as it is."""
    dim: int = call.node.args[3]  # type: ignore[assignment]
    labels = list(numbered(call.shapes[0]))
    result = [*labels[:dim], ("resized",), *labels[dim + 1 :]]
    return OpAxes(
        operands=(tuple(labels),),
        results=(tuple(result),),
        share=shares(needs_all=[f"d{dim}", "resized"]),
        reason="it is joined or cut over the ranks of tensor parallelism",
    )


def first_resized(call: Call) -> OpAxes:
    """The same along the first dimension, as torch's functional collectives do it."""
    labels = numbered(call.shapes[0])
    return OpAxes(
        operands=(labels,),
        results=((("resized",), *labels[1:]),),
        share=shares(needs_all=["d0", "resized"]),
        reason="it is joined or cut over other ranks",
    )


RULES: dict[object, AxisRule] = {
    parallel_calls.ENTER: elementwise,
    parallel_calls.SUM: elementwise,
    parallel_calls.ON_FIRST: elementwise,
    parallel_calls.OWN_ROWS: elementwise,
    **dict.fromkeys(parallel_calls.RESIZING, resized),
    # What Dynamo makes of torch.distributed's collectives in a model.
    "_c10d_functional::all_reduce": elementwise,
    "_c10d_functional::wait_tensor": elementwise,
    "_c10d_functional::broadcast": elementwise,
    "_c10d_functional::all_gather_into_tensor": first_resized,
    "_c10d_functional::reduce_scatter_tensor": first_resized,
}
