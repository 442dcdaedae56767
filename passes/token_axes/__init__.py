"""Token axes: which dimension of which value runs along the sequence."""

from ringfx.passes.token_axes.channel_maps import axes_of_channel_maps
from ringfx.passes.token_axes.find_token_lines import find_lines
from ringfx.passes.token_axes.row_maps import axes_of_row_maps
from ringfx.passes.token_axes.token_line import Lines, TokenDim, TokenLine
from ringfx.passes.token_axes.without_attention import (
    InputAxis,
    axes_of_inputs,
    axes_that_are_given,
)

__all__ = [
    "InputAxis",
    "Lines",
    "TokenDim",
    "TokenLine",
    "axes_of_channel_maps",
    "axes_of_inputs",
    "axes_of_row_maps",
    "axes_that_are_given",
    "find_lines",
]
