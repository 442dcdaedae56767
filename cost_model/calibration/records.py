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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_type_hints

from pydantic import ConfigDict, Field

from ringfx.errors import InvalidArgument, ProfileError
from ringfx.validation.fields import STRICT, FloatDtype, Level, Ranks, Size, SomeText, Text, Tokens
from ringfx.validation.json_reader import Source, parse_json, shown, validated
from ringfx.validation.text_files import read_text, write_text

__all__ = ["AttentionRecord", "MessageRecord", "Record", "read_records", "write_records"]

_WRITER = "give rows as `ringfx calibrate --records` writes them"

Direction = Literal["forward", "backward"]
Operation = Literal["send_recv", "all_gather", "reduce_scatter", "all_to_all", "all_reduce"]

Measured: TypeAlias = Annotated[float, Field(gt=1e-9, le=1e12, allow_inf_nan=False)]
"""Milliseconds; a clock tells no shorter times apart."""
MeasuredBytes: TypeAlias = Annotated[int, Field(ge=1, le=2**60)]


@dataclass(frozen=True, kw_only=True)
class AttentionRecord:
    """One attention, timed and weighed.

    Lengths are of the whole sequence, times of the slowest rank. ``median_ms`` and ``peak_bytes``
    are None where they were not measured; with ``out_of_memory`` both are, and ``capacity_bytes``
    says what was too little.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    device: SomeText
    """The device's own name, as ``devices.device_name`` gives it."""
    software: SomeText
    """Versions, such as ``torch 2.13.0``."""
    dtype: FloatDtype
    strategy: Text
    """The strategy, or empty where a kernel was timed by itself."""
    kernel: Text
    batch: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    v_head_dim: Size
    q_len: Tokens
    kv_len: Tokens
    mask: Text
    density: Annotated[float, Field(gt=1e-12, le=1)]
    """Share of (query, key) pairs that are computed."""
    world_size: Ranks
    direction: Direction
    link: Text = ""
    """What joins the ranks, such as ``loopback``; empty at one rank."""
    median_ms: Measured | None = None
    spread: Level | None = None
    """Of a thing measured against itself: half the interquartile range over the median, or what
    the source says about repeated runs (2.0: the same run may take three times as long)."""
    again: Level | None = None
    """A/A: by how much the medians of the odd and the even repetitions differ, as a share."""
    peak_bytes: MeasuredBytes | None = None
    """Of one rank, the tensors of the attention itself included."""
    out_of_memory: bool = False
    capacity_bytes: MeasuredBytes | None = None
    suspect_peak: Text = ""
    """Why ``peak_bytes`` contradicts its own source; it is shown, and not fitted."""
    origin: Text = ""

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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    device: SomeText
    software: SomeText
    link: SomeText
    operation: Operation
    world_size: Annotated[int, Field(ge=2, le=2**24)]
    bytes: MeasuredBytes
    """Received by one rank."""
    min_ms: Measured
    median_ms: Measured
    origin: Text = ""


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
        The file cannot be read, or a row lacks a field, has an unknown one, or a value that cannot
        be; the text names the row.
    """
    if not isinstance(source, Path | str):
        raise InvalidArgument(
            f"read_records: source={shown(source)} is a {type(source).__name__}. Do: give a Path,"
            " or the text of a file."
        )
    where = name or (str(source) if isinstance(source, Path) else "the text")
    text = read_text(source, ProfileError) if isinstance(source, Path) else source
    rows = _csv_rows(text, where) if where.endswith(".csv") else _json_rows(text, where)
    records = tuple(_record(row, f"{where}, row {number}") for number, row in rows)
    if not records:
        raise ProfileError(f"{where} holds no records. Do: {_WRITER}.")
    return records


def write_records(records: Sequence[Record], path: Path) -> None:
    """As JSON lines; fields at their default are left out.

    Raises
    ------
    InvalidArgument
        The file cannot be written; what was there is as it was.
    """
    write_text(path, "".join(json.dumps(_row(record)) + "\n" for record in records))


def _row(record: Record) -> dict[str, Any]:
    kind = next(name for name, cls in KINDS.items() if isinstance(record, cls))
    defaults = {f.name: f.default for f in fields(record)}
    row = {k: v for k, v in asdict(record).items() if v != defaults[k]}
    return {"kind": kind, **row}


def _source(where: str) -> Source:
    return Source(where=where, damaged=where, error=ProfileError, remedy=_WRITER)


def _json_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, _source(f"{where}, row {number}"))
        if not isinstance(row, dict):
            raise ProfileError(
                f"{where}, row {number}: a row must be an object with fields. Do: {_WRITER}."
            )
        yield number, row


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows by header; the first data row is number 1, an empty cell is a field left out.

    But of a text field it is an empty text.
    """
    number = 0
    try:
        table = csv.DictReader(io.StringIO(text), strict=True)
        _check_header(table.fieldnames or (), where)
        for number, cells in enumerate(table, 1):
            if None in cells:
                raise ProfileError(
                    f"{where}, row {number}: more cells than the header has names. Do: name every "
                    "column, and put text with commas in quotes."
                )
            yield number, _values(cells, f"{where}, row {number}")
    except csv.Error as error:
        raise ProfileError(
            f"{where}, after row {number}: not CSV ({error}). Do: {_WRITER}."
        ) from error


def _check_header(names: Sequence[str], where: str) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ProfileError(
                f"{where}: the header names {shown(name)} twice. Do: give each column its own name."
            )


def _values(cells: Mapping[str, str | None], where: str) -> Mapping[str, Any]:
    cls = KINDS.get(cells.get("kind") or "attention", AttentionRecord)
    texts = {name for name, kind in get_type_hints(cls).items() if kind is str}
    given = {k: v for k, v in cells.items() if v or (k in texts and v is not None)}
    return {k: v if k in texts else _cell(v or "", where) for k, v in given.items()}


def _cell(text: str, where: str) -> Any:
    """Numbers and booleans as JSON writes them, all else as text."""
    word = text.lower() if text.lower() in ("true", "false") else text
    if word in ("true", "false") or word[:1] in "-0123456789":
        try:
            return json.loads(word)
        except json.JSONDecodeError:
            return text
        except ValueError:
            raise ProfileError(
                f"{where}: it has a number with thousands of digits. Do: {_WRITER}."
            ) from None
    return text


# --- checking a row ---------------------------------------------------------------------------


def _record(row: Mapping[str, Any], where: str) -> Record:
    given = dict(row)
    kind = given.pop("kind", "attention")
    if kind == "attention":
        return validated(AttentionRecord, given, _source(where), _of_attention)
    if kind == "message":
        return validated(MessageRecord, given, _source(where), _of_message)
    known = " or ".join(f'"{name}"' for name in KINDS)
    raise ProfileError(f"{where}: a record of the kind {shown(kind)}. Do: let kind be {known}.")


def _of_message(record: MessageRecord) -> Iterator[str]:
    if record.min_ms > record.median_ms:
        yield "min_ms is above median_ms"


def _of_attention(record: AttentionRecord) -> Iterator[str]:
    """What no single field shows."""
    if record.heads % record.kv_heads:
        yield f"heads {record.heads} is not a multiple of kv_heads {record.kv_heads}"
    if not record.kernel and not record.strategy:
        yield "it names neither a kernel nor a strategy"
    if record.out_of_memory and record.capacity_bytes is None:
        yield "out_of_memory needs capacity_bytes, the memory that was too small"
    if record.out_of_memory and (record.median_ms is not None or record.peak_bytes is not None):
        yield "out_of_memory has no time and no peak"
    if not record.out_of_memory and record.median_ms is None and record.peak_bytes is None:
        yield "measured nothing: give median_ms, peak_bytes or both"
