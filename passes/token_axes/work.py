"""What calls cost, in bytes of memory traffic: the one unit in which placements are compared."""

from __future__ import annotations

from math import prod

from torch.fx import Node

from ringfx.cost_model.prediction.products import product_flops
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import AxisSharing, result_values
from ringfx.passes.capture.gradients import needs_grad

__all__ = ["COMMUNICATION", "bytes_of", "work_of"]

COMMUNICATION = 8
"""Cost of a byte between ranks, in bytes of memory traffic: links are about this much slower than
memory (NVLink 450 GB/s against HBM 3.3 TB/s on H100, vendor data sheets)."""
FLOPS_PER_BYTE = 100
"""Floating-point operations that take as long as a byte of memory traffic (same data sheets)."""


def bytes_of(node: Node) -> int:
    return sum(v.numel() * v.element_size() for v in result_values(node))


def work_of(axes: AxisMap, node: Node) -> int:
    """Bytes written, and operations of contractions as bytes; doubled where a backward runs."""
    operations = product_flops(node) or _summed(axes, node)
    return int(bytes_of(node) + operations / FLOPS_PER_BYTE) * (2 if needs_grad(node) else 1)


def _summed(axes: AxisMap, node: Node) -> float:
    """Operations of another call that sums products of its operands along some axes."""
    named = axes.ops[node]
    if not named.axes.results or len(named.call.operands) < 2:
        return 0.0
    contracted = prod(
        axes.space.size(axes.label(node, label))
        for label, share in named.axes.share.items()
        if share is AxisSharing.PARTIAL_SUM
    )
    elements = sum(v.numel() for v in result_values(node))
    return 2.0 * elements * contracted if contracted > 1 else 0.0
