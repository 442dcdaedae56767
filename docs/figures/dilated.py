"""Draws which keys each query of two heads attends: ``python docs/figures/dilated.py``.

Writes dilated.svg beside itself, from the same ``KeptRows`` that the operator uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ringfx.ir.dilation import Branch, KeptRows

TOKENS, CELL, GAP, TOP = 32, 6, 28, 34
BRANCHES = (Branch(segment=8, rate=1), Branch(segment=16, rate=2), Branch(segment=32, rate=4))
COLOURS = ("#3b6ea8", "#c46a2b", "#4b8f5b")


def pairs(branch: Branch, head: int) -> Iterator[tuple[int, int]]:
    """(query, key) of one head in one branch."""
    offset = head % branch.rate
    rows = KeptRows(length=TOKENS, segment=branch.segment, rate=branch.rate, offset=offset)
    kept = rows.positions()
    for query in kept:
        for key in kept:
            if query // branch.segment == key // branch.segment:
                yield query, key


def panel(x: int, y: int, branch: Branch, head: int, colour: str) -> Iterator[str]:
    size = TOKENS * CELL
    yield f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="none" stroke="#999"/>'
    for query, key in pairs(branch, head):
        at = f'x="{x + key * CELL}" y="{y + query * CELL}"'
        yield f'<rect {at} width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>'
    words = f"head {head}, segment {branch.segment}, rate {branch.rate}"
    yield f'<text x="{x}" y="{y - 6}" font-size="11" font-family="sans-serif">{words}</text>'


def main() -> None:
    step = TOKENS * CELL + GAP
    parts = [
        line
        for row, head in enumerate((0, 1))
        for column, (branch, colour) in enumerate(zip(BRANCHES, COLOURS, strict=True))
        for line in panel(10 + column * step, TOP + row * (step + 8), branch, head, colour)
    ]
    width, height = 10 + len(BRANCHES) * step, TOP + 2 * (step + 8)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
    Path(__file__).with_suffix(".svg").write_text("\n".join([opening, *parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
