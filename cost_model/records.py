"""Measurements as data: one schema for what was timed, on what, under which conditions.

Two kinds of rows. An attention row says how long one attention took and what memory it peaked at,
or that it ran out of memory on a card of known capacity: a censored observation, which tells that
more than the capacity is needed. A message row says how long one collective took.

Files are JSON lines or CSV with the field names as header; a row without ``kind`` is an attention.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ringfx.errors import ProfileError

__all__ = ["AttentionRecord", "MessageRecord", "Record", "read_records", "write_records"]

Direction = Literal["forward", "backward"]
Operation = Literal["send_recv", "all_gather", "reduce_scatter", "all_to_all", "all_reduce"]


@dataclass(frozen=True, kw_only=True)
class AttentionRecord:
    """One attention, timed and weighed.

    Lengths are of the whole sequence, times of the slowest rank. ``median_ms`` and ``peak_bytes``
    are None where they were not measured; with ``out_of_memory`` both are, and ``capacity_bytes``
    says what was too little.
    """

    device: str
    """The device's own name, as ``devices.device_name`` gives it."""
    software: str
    """Versions, such as ``torch 2.13.0``."""
    dtype: str
    strategy: str
    """The strategy, or empty where a kernel was timed by itself."""
    kernel: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    q_len: int
    kv_len: int
    mask: str
    density: float
    """Share of (query, key) pairs that are computed."""
    world_size: int
    direction: Direction
    link: str = ""
    """What joins the ranks, such as ``loopback``; empty at one rank."""
    median_ms: float | None = None
    spread: float | None = None
    """Of a thing measured against itself: half the interquartile range over the median, or what
    the source says about repeated runs (2.0: the same run may take three times as long)."""
    again: float | None = None
    """A/A: by how much the medians of the odd and the even repetitions differ, as a share."""
    peak_bytes: int | None = None
    """Of one rank, the tensors of the attention itself included."""
    out_of_memory: bool = False
    capacity_bytes: int | None = None
    suspect_peak: str = ""
    """Why ``peak_bytes`` contradicts its own source; it is shown, and not fitted."""
    origin: str = ""

    @property
    def pairs(self) -> float:
        """(query, key) pairs computed by one rank."""
        return self.scores * self.density

    @property
    def scores(self) -> float:
        """(query, key) pairs of one rank's rows, masked ones included."""
        return self.batch * self.heads * self.q_len * self.kv_len / self.world_size


@dataclass(frozen=True, kw_only=True)
class MessageRecord:
    """One collective, timed. Latency is fitted on minima: medians hold the scheduler's ticks."""

    device: str
    software: str
    link: str
    operation: Operation
    world_size: int
    bytes: int
    """Received by one rank."""
    min_ms: float
    median_ms: float
    origin: str = ""


Record: TypeAlias = AttentionRecord | MessageRecord

KINDS: Mapping[str, type[AttentionRecord] | type[MessageRecord]] = {
    "attention": AttentionRecord,
    "message": MessageRecord,
}


def read_records(source: Path | str, name: str | None = None) -> tuple[Record, ...]:
    """The records of a file (a Path) or of its text (with ``name`` for errors).

    Raises
    ------
    ProfileError
        A row lacks a field, has an unknown one, or a value that cannot be; the text names the row.
    """
    where = name or str(source)
    text = source.read_text() if isinstance(source, Path) else source
    rows = _csv_rows(text, where) if where.endswith(".csv") else _json_rows(text, where)
    records = tuple(_record(row, f"{where}, row {number}") for number, row in rows)
    if not records:
        raise ProfileError(f"{where} holds no records.")
    return records


def write_records(records: Sequence[Record], path: Path) -> None:
    """As JSON lines; fields at their default are left out."""
    path.write_text("".join(json.dumps(_row(record)) + "\n" for record in records))


def _row(record: Record) -> dict[str, Any]:
    kind = next(name for name, cls in KINDS.items() if isinstance(record, cls))
    defaults = {f.name: f.default for f in fields(record)}
    row = {k: v for k, v in asdict(record).items() if v != defaults[k]}
    return {"kind": kind, **row}


def _json_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProfileError(f"{where}, row {number}: not JSON ({error.msg}).") from error
        if not isinstance(row, dict):
            raise ProfileError(f"{where}, row {number}: a row must be an object with fields.")
        yield number, row


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows by header; the first data row is number 1, an empty cell is a field left out.

    But of a text field it is an empty text.
    """
    for number, cells in enumerate(csv.DictReader(io.StringIO(text)), 1):
        if None in cells:
            raise ProfileError(f"{where}, row {number}: more cells than the header has names.")
        cls = KINDS.get(cells.get("kind") or "attention", AttentionRecord)
        texts = {f.name for f in fields(cls) if f.type == "str"}
        given = {k: v for k, v in cells.items() if v or (k in texts and v is not None)}
        yield number, {k: v if k in texts else _cell(v) for k, v in given.items()}


def _cell(text: str) -> Any:
    """Numbers and booleans as JSON writes them, all else as text."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        return text


# --- checking a row ---------------------------------------------------------------------------


def _record(row: Mapping[str, Any], where: str) -> Record:
    given = dict(row)
    kind = given.pop("kind", "attention")
    if kind not in KINDS:
        raise ProfileError(f"{where}: kind {kind!r} is not one of {', '.join(KINDS)}.")
    cls = KINDS[kind]
    known = {f.name: f for f in fields(cls)}
    unknown = [name for name in given if name not in known]
    missing = [n for n, f in known.items() if f.default is MISSING and n not in given]
    if unknown or missing:
        what = f"unknown field {unknown[0]!r}" if unknown else f"field {missing[0]!r} is missing"
        raise ProfileError(f"{where}: {what}. Fields of {kind}: {', '.join(known)}.")
    for name, value in given.items():
        _check_value(name, value, str(known[name].type), where)
    record = cls(**given)
    _check_record(record, where)
    return record


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    return not isinstance(value, bool) and math.isfinite(value)


CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", lambda v: isinstance(v, str)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "int": ("a whole number above 0", lambda v: _is_count(v) and v > 0),
    "float": ("a number above 0", lambda v: isinstance(v, float | int) and _is_finite(v)),
    "Direction": (" or ".join(get_args(Direction)), lambda v: v in get_args(Direction)),
    "Operation": (", ".join(get_args(Operation)), lambda v: v in get_args(Operation)),
}


def _check_value(name: str, value: Any, type_text: str, where: str) -> None:
    base, _, optional = type_text.partition(" | ")
    if value is None and optional == "None":
        return
    words, holds = CHECKS[base]
    positive = base not in ("int", "float") or (holds(value) and value > 0)
    if name in ("spread", "again", "bytes"):
        positive = holds(value) and value >= 0
    if not (holds(value) and positive):
        raise ProfileError(f"{where}: {name} must be {words}; got {value!r}.")


def _check_record(record: Record, where: str) -> None:
    """What no single field shows."""
    if isinstance(record, MessageRecord):
        if record.min_ms > record.median_ms:
            raise ProfileError(f"{where}: min_ms is above median_ms.")
        return
    if record.density > 1:
        raise ProfileError(f"{where}: density must be at most 1; got {record.density}.")
    if record.out_of_memory and record.capacity_bytes is None:
        raise ProfileError(f"{where}: out_of_memory needs capacity_bytes, what was too little.")
    if record.out_of_memory and (record.median_ms is not None or record.peak_bytes is not None):
        raise ProfileError(f"{where}: out_of_memory has no time and no peak.")
    if not record.out_of_memory and record.median_ms is None and record.peak_bytes is None:
        raise ProfileError(f"{where}: measured nothing: give median_ms, peak_bytes or both.")
