"""Token axes: which dimension of which value runs along the sequence."""

from ringfx.passes.token_axes.find_token_lines import find_lines
from ringfx.passes.token_axes.token_line import Lines, TokenDim, TokenLine

__all__ = ["Lines", "TokenDim", "TokenLine", "find_lines"]
