"""Rewrite: the placement becomes the program that one rank runs, the same for every rank.

Local shapes, ring operators, and for every change of placement a conjugate collective, placed right
after the value it converts (in that value's own gradient mode).
"""

from ringfx.passes.rewrite.local import DeferredOutput, LocalProgram, SplitOutput, rewrite

__all__ = ["DeferredOutput", "LocalProgram", "SplitOutput", "rewrite"]
