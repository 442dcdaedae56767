"""The text of a detection report: one table row a group of equal attentions, then the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.folding import fold_names
from ringfx.ir.tiles import TILE_OPS, Expr
from ringfx.ir.tiles.operators import COMPARISONS
from ringfx.ir.tiles.words import whole_text
from ringfx.ir.values import AttentionSite, Declined
from ringfx.report.detection_report import DetectionReport
from ringfx.units.columns import table_lines

__all__ = ["formula", "render", "tile_text"]

INFIX = {name: op.infix for name, op in TILE_OPS.items() if op.infix is not None}
LONGEST = 200
"""Characters of a mask's expression; the words say it anyway."""


def render(report: DetectionReport) -> RenderableType:
    """The count, a table of what was found, near misses, what was missed, graph breaks."""
    parts: list[RenderableType] = [Text(_count(report), "bold")]
    if report.sites:
        parts.append(_table(report.sites))
    parts += _section("attention-like regions not parallelized", _lines(report.declined))
    parts += _section("looks like attention, NOT RECOGNISED", _lines(report.missed))
    parts += _section("graph breaks (the code between them is not analysed)", report.graph_breaks)
    return Group(*parts)


def _count(report: DetectionReport) -> str:
    found, total = len(report.sites), report.attentions
    declined = total - found - len(report.missed)
    words = [f"attention: {found}/{total} found"]
    words += [f"{declined} declined"] if declined else []
    words += [f"{len(report.missed)} MISSED"] if report.missed else []
    return ", ".join(words)


TITLES = ("attention", "", "found by", "at", "mask")


def _table(sites: Sequence[AttentionSite]) -> RenderableType:
    """One line for each group of equal attentions, then what it computes, indented."""
    groups = list(_groups(sites))
    title, *rows = table_lines([TITLES, *(_cells(*group) for group in groups)], left=range(5))
    lines = [Text(title, "bold"), Text("─" * max(map(len, (title, *rows))), "dim")]
    for (_, _, site), row in zip(groups, rows, strict=True):
        lines.append(Text(row, "bold"))
        lines += [Text(f"    {detail}", "dim") for detail in form(site)]
    return Padding(Group(*lines), (1, 0, 0, 0))


def _cells(name: str, count: int, site: AttentionSite) -> tuple[str, ...]:
    times = f"{count} x" if count > 1 else ""
    return (name or "top level", times, site.found_by, site.source, site.mask_words)


def _groups(sites: Sequence[AttentionSite]) -> Iterator[tuple[str, int, AttentionSite]]:
    """Sites that differ in name only, once, under the name of all of them."""
    alike: dict[AttentionSite, list[AttentionSite]] = {}
    for site in sites:
        alike.setdefault(replace(site, node="", name=""), []).append(site)
    for members in alike.values():
        for name, places in fold_names([m.name for m in members]):
            yield name, len(places), members[0]


def form(site: AttentionSite) -> Iterator[str]:
    """The canonical form: the formula, then the operands."""
    yield formula(site.spec)
    heads = f"{site.heads}" if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"
    dims = f"{site.head_dim}"
    if site.v_head_dim != site.head_dim:
        dims += f" (values {site.v_head_dim})"
    tokens = f"{site.q_len:,} x {site.kv_len:,} tokens"
    yield f"{site.batch} x {heads} heads x {tokens}, head dim {dims}, {site.dtype}"
    if site.matrix_bytes:
        yield f"reads {whole_text(site.matrix_bytes, taken=site.taken_bytes)}"


def formula(spec: AttentionSpec) -> str:
    """One line of mathematics.

    >>> from ringfx.ir.tiles import CAUSAL
    >>> formula(AttentionSpec(scale=0.125, q_len=8, kv_len=8, keep=CAUSAL, soft_cap=30.0))
    'softmax(30 tanh(0.125 q k^T / 30)) v where k <= q'
    """
    scores = f"{spec.scale:.4g} q k^T" if spec.scale != 1 else "q k^T"
    if spec.soft_cap is not None:
        scores = f"{spec.soft_cap:g} tanh({scores} / {spec.soft_cap:g})"
    if spec.bias is not None:
        scores += f" + {_short(tile_text(spec.bias))}"
    if spec.sinks:
        scores += ", a sink for each head"
    dropped = f", dropout {spec.dropout:g}" if spec.dropout else ""
    kept = "" if spec.keep is None else f" where {_short(tile_text(spec.keep))}"
    empty = "; rows without keys give the mean of v" if spec.fully_masked == "mean" else ""
    if spec.slope is not None:
        empty += f"; scores count {_short(tile_text(spec.slope))} in rows that the bias hides"
    return f"softmax({scores}{dropped}) v{kept}{empty}"


def tile_text(expr: Expr) -> str:
    """A tile function in infix notation.

    >>> tile_text(("and", ("le", ("k",), ("q",)), ("at", 0, ("b",), ("k",))))
    'k <= q and input0[b, k]'
    >>> tile_text(("mul", ("add", ("q",), ("const", 1)), ("neg", ("k",))))
    '(q + 1) * neg(k)'
    """
    head, *args = expr
    if head == "const":
        return f"{args[0]:g}" if isinstance(args[0], float) else str(args[0]).lower()
    if head == "at":
        places = ", ".join(tile_text(e) for e in args[1:])
        return f"input{args[0]}[{places}]"
    if not args:
        return str(head)
    if head in INFIX:
        left, right = (_operand(head, e) for e in args)
        return f"{left} {INFIX[head]} {right}"
    return f"{head}({', '.join(tile_text(e) for e in args)})"


def _operand(head: str, expr: Expr) -> str:
    """Comparisons need no brackets inside a conjunction; everything else that is infix does."""
    text = tile_text(expr)
    plain = expr[0] not in INFIX or (head in ("and", "or") and expr[0] not in ("or", "and", "xor"))
    sums = head in COMPARISONS and expr[0] in ("add", "sub", "mul")
    return text if plain or sums or expr[0] == head == "and" else f"({text})"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _lines(near: Iterable[Declined]) -> list[str]:
    """Near misses of one line and reason, once, under the name of all of them."""
    alike: dict[tuple[str, str], list[str]] = {}
    for x in near:
        alike.setdefault((x.source, x.reason), []).append(x.name)
    return [
        f"{name or 'top level'} ({source}): {reason}"
        for (source, reason), names in alike.items()
        for name, _ in fold_names(names)
    ]


def _section(title: str, lines: Sequence[str]) -> list[RenderableType]:
    if not lines:
        return []
    body = Text("\n".join(lines))
    return [Padding(Text(title, "bold"), (1, 0, 0, 0)), Padding(body, (0, 0, 0, 2))]
