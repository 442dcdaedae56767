"""Capture: the Dynamo graph becomes a flat, functional, pre-dispatch ATen graph.

Guarantees to what follows: no higher-order operator, no in-place operator, no vmapped region, no
autograd.Function is left (each is inlined with its meaning kept, or refused by name); every node
knows its global shape, its module path, its source line and whether a gradient flows through it.
"""

from ringfx.passes.capture.trace import capture

__all__ = ["capture"]
