"""Damaged files: seeded corruptions of JSON and CSV text, as disks and editors make them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["corrupted"]

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, -4097, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**63, 10**18,
    10**400,
    float("nan"), float("inf"), -float("inf"), "", "x", "nan", "1", "-1", "\ud800", "\x00",
    "\x1b[31m",
    "[/b]", "é" * 300, "2026-13-45", [], {}, [[]], [None], [1, 2], {"a": 1}, ["le", ["k"]],
    ["floordiv", ["q"], ["const", 0]], ["pow", ["const", 10], ["const", 10**9]],
    ["le", ["at", 0, ["k"]], ["bitand", ["q"], ["const", 0.5]]], "cuda", "cpu",
    "forward", "backward",
    "float32", "ulysses", "whole",
)  # fmt: skip
"""What is put in place of a value."""


def corrupted(text: str, rng: random.Random) -> bytes:
    """The text with one to three faults, of its JSON values or of its bytes."""
    content: str | bytes = text
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if isinstance(content, str) and rng.random() < 0.75:
            content = _in_values(content, rng)
        else:
            content = _in_bytes(_encoded(content), rng)
    return _encoded(content)


def _encoded(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


# --- values ---------------------------------------------------------------------------------------


def _in_values(text: str, rng: random.Random) -> str:
    """A fault in one row of JSON lines, or in the one document."""
    lines = text.splitlines()
    is_lines = len(lines) > 1 and lines[0].startswith("{") and lines[0].endswith("}")
    at = rng.randrange(len(lines)) if is_lines else 0
    try:
        document = json.loads(lines[at] if is_lines else text)
    except (ValueError, RecursionError):
        return text
    places = list(_places(document))
    if not places:
        return text
    fault = rng.choice(FAULTS)
    fault(*rng.choice(places), rng)
    lines[at : at + 1 if is_lines else len(lines)] = [json.dumps(document)]
    return "\n".join(lines) + "\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _replace(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = rng.choice(ODD_VALUES)


def _scale(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = value * rng.choice((-1, 0, 2, 3, 0.5, 1e9, 1e-9, 2**20))
    elif isinstance(value, str):
        holder[key] = rng.choice((value[:-1], value + "x", value.upper(), value * 3))
    else:
        _replace(holder, key, rng)


def _delete(holder: Any, key: Any, rng: random.Random) -> None:
    del holder[key]


def _rename(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((key + "x", key[:-1], key.upper(), "", "schema"))] = holder.pop(key)
    else:
        holder.insert(0, holder[key])


def _swap(holder: Any, key: Any, rng: random.Random) -> None:
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    other = rng.choice(list(keys))
    holder[key], holder[other] = holder[other], holder[key]


def _nest(holder: Any, key: Any, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 5, 300))):
        holder[key] = [rng.choice(("not", "neg", "k")), holder[key]]


FAULTS: tuple[Callable[[Any, Any, random.Random], None], ...] = (
    _replace, _replace, _replace, _scale, _scale, _delete, _rename, _swap, _nest,
)  # fmt: skip


# --- bytes ----------------------------------------------------------------------------------------


def _in_bytes(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return content
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice((1, 1, 4, 50)))
    flipped = bytes([content[start] ^ (1 << rng.randrange(8))])
    made: tuple[Callable[[], bytes], ...] = (
        lambda: content[:start] + flipped + content[start + 1 :],
        lambda: content[:start] + flipped + content[start + 1 :],
        lambda: content[:start] + flipped + content[start + 1 :],
        lambda: content[:start] + content[stop:],
        lambda: content[:stop] + content[start:],
        lambda: content[:start] + rng.randbytes(3) + content[start:],
        lambda: content[:start] + b"\0" + content[start:],
        lambda: content[:start] + b"9" * rng.choice((1, 3, 30, 5000)) + content[start:],
        lambda: content[:start],
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: gzip.compress(content, mtime=0),
        lambda: b"[" * 100_000 + content,
        lambda: b"",
    )
    return rng.choice(made)()
