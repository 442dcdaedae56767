"""Attention over a window of a line, said of the line: what lies outside is no key and no query.

A window is stored where its line is, so its attention runs over the line's positions with a mask
that shows the window's keys only and counts from its first token. Rows outside hold garbage that
nothing reads.
"""

from __future__ import annotations

from dataclasses import replace

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.tiles import CAUSAL, Expr, conjunction, map_children
from ringfx.passes.token_axes.axis_on_line import AxisOnLine

__all__ = ["along_the_line", "can_move"]


def can_move(spec: AttentionSpec) -> bool:
    """Whether the positions of an attention's tokens may be counted from elsewhere.

    The mean of all values over a row without keys counts them.
    """
    return spec.fully_masked == "zero"


def along_the_line(
    spec: AttentionSpec, queries: AxisOnLine, keys: AxisOnLine, q_len: int, kv_len: int
) -> AttentionSpec:
    """The same attention, over all positions of the lines that hold its queries and keys.

    What is read at a rank's own rows is stored along the line already.
    """
    if (queries.length, keys.length) == (q_len, kv_len):
        return spec
    assert can_move(spec), spec
    shown = None
    if keys.length != kv_len:
        end = keys.offset + keys.length
        from_start: Expr = ("ge", ("k",), ("const", keys.offset))
        before_end: Expr = ("lt", ("k",), ("const", end))
        shown = conjunction(
            from_start if keys.offset else None, before_end if end < kv_len else None
        )
    return replace(
        spec,
        q_len=q_len,
        kv_len=kv_len,
        keep=conjunction(_moved(spec.keep, queries, keys), shown),
        bias=_moved(spec.bias, queries, keys),
        score_map=_moved(spec.score_map, queries, keys),
        slope=_moved(spec.slope, queries, keys),
        counts_from=(queries.offset, keys.offset) if spec.dropout else (0, 0),
    )


def _moved(expr: Expr | None, queries: AxisOnLine, keys: AxisOnLine) -> Expr | None:
    return None if expr is None else _from_windows(expr, queries, keys)


def _from_windows(expr: Expr, queries: AxisOnLine, keys: AxisOnLine, read: bool = False) -> Expr:
    """The expression, positions counted from the windows; ``read``: as indices of a tensor."""
    if expr == CAUSAL and queries.offset == keys.offset:
        return expr  # kernels know it as it stands
    if expr[0] in ("q", "k"):
        return _position(expr, queries if expr[0] == "q" else keys, read)
    reads = read or expr[0] == "at"
    return map_children(lambda e: _from_windows(e, queries, keys, reads), expr)


def _position(leaf: Expr, member: AxisOnLine, read: bool) -> Expr:
    place: Expr = ("sub", leaf, ("const", member.offset)) if member.offset else leaf
    if not read:
        return place
    return ("max", ("min", place, ("const", member.length - 1)), ("const", 0))
