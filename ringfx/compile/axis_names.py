"""What a plan calls the token axes of a program, and which of them are split."""

from __future__ import annotations

from ringfx.ir.values import TokenAxis
from ringfx.passes.rewrite import LocalProgram
from ringfx.passes.token_axes import Lines, TokenDim, TokenLine

__all__ = ["axis_name", "token_axes"]


def axis_name(lines: Lines, tokens: TokenDim, *, is_local: bool) -> str:
    """The axis along which an attention is split, and whether in blocks of its queries."""
    name = _line_name(lines, lines.lines[tokens.line])
    blocks = tokens.inner != 1 and not is_local
    return f"{name}, each of {tokens.inner} of its queries" if blocks else name


def _line_name(lines: Lines, line: TokenLine) -> str:
    return f"tokens {line.index}" if len(lines.lines) > 1 else "tokens"


def token_axes(local: LocalProgram) -> tuple[TokenAxis, ...]:
    """The axes along which some value of the rewritten program is split; with one rank, all."""
    placement = local.placement
    lines = placement.lines
    values = {v for value in local.values for v in (value, *value.users) if placement.is_sharded(v)}
    used = {c.line for v in values if isinstance(c := lines.token_dim(v), TokenDim)}
    return tuple(
        TokenAxis(
            axis=_line_name(lines, line),
            length=line.length,
            layout=line.layout.kind,
            local_length=line.layout.local_length,
        )
        for line in lines.lines
        if line.index in used or line.layout.world_size == 1
    )
