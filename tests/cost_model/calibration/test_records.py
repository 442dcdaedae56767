from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ringfx.cost_model.calibration.records import (
    AttentionRecord,
    MessageRecord,
    read_records,
    write_records,
)
from ringfx.errors import ProfileError

SEED = (resources.files("ringfx.cost_model") / "records" / "gtx-1080-seed.jsonl").read_text()

MESSAGE: dict[str, Any] = {
    "kind": "message",
    "device": "AMD EPYC",
    "software": "torch 2.13.0",
    "link": "loopback",
    "operation": "all_gather",
    "world_size": 2,
    "bytes": 1024,
    "min_ms": 0.1,
    "median_ms": 0.2,
}


def _attention(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {**json.loads(SEED.splitlines()[0]), **changes}
    return {k: v for k, v in row.items() if v is not None}


def _read(*rows: dict[str, Any]) -> Any:
    return read_records("".join(json.dumps(row) + "\n" for row in rows), "mine.jsonl")


def test_the_seed_table_is_nine_records_with_one_suspect_and_one_out_of_memory() -> None:
    records = read_records(SEED, "seed.jsonl")
    assert len(records) == 9
    assert all(isinstance(r, AttentionRecord) for r in records)
    suspects = [r for r in records if isinstance(r, AttentionRecord) and r.suspect_peak]
    assert [(r.strategy, r.q_len, r.peak_bytes) for r in suspects] == [("simple", 8192, 2**31)]
    lost = [r for r in records if isinstance(r, AttentionRecord) and r.out_of_memory]
    assert [(r.strategy, r.q_len, r.capacity_bytes) for r in lost] == [
        ("simple", 16384, round(7.88 * 2**30))
    ]


def test_records_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    records = (*read_records(SEED, "seed.jsonl"), *_read(MESSAGE))
    path = tmp_path / "all.jsonl"
    write_records(records, path)
    assert read_records(path) == records
    assert isinstance(records[-1], MessageRecord)


def test_csv_gives_the_same_records_as_json_lines() -> None:
    records = read_records(SEED, "seed.jsonl")
    rows = [asdict(record) for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    assert read_records(text.getvalue(), "seed.csv") == records


def _csv(*rows: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def test_both_kinds_and_texts_that_look_like_numbers_come_through_csv() -> None:
    """A layer timed whole has no kernel; a version is a text; a message has no heads."""
    rows = [_attention(kernel="", software="2.13"), {**MESSAGE, "software": "2.13"}]
    assert read_records(_csv(*rows), "mine.csv") == _read(*rows)


def test_a_damaged_csv_names_the_row() -> None:
    good = _csv(_attention(kernel=""), _attention())
    with pytest.raises(ProfileError) as caught:
        read_records(good.rstrip() + ",1,2\n", "mine.csv")
    assert str(caught.value) == (
        "mine.csv, row 2: more cells than the header has names. Do: name every column, and put text"
        " with commas in quotes."
    )
    with pytest.raises(
        ProfileError, match=r"mine\.csv, row 2: heads must be an integer; got 'many'"
    ):
        read_records(_csv(_attention(), _attention(heads="many")), "mine.csv")


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_a_time_that_is_no_number_is_refused(number: str) -> None:
    row = json.dumps(_attention()).replace(json.dumps(_attention()["median_ms"]), number)
    with pytest.raises(ProfileError, match=r"row 1: \w+ must be a .*; got (nan|inf)\."):
        read_records(row, "mine.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_attention(heads=0), "heads must be 1 or more; got 0."),
        (_attention(heads=2.5), "heads must be an integer; got 2.5."),
        (_attention(heads=True), "heads must be an integer; got True."),
        (_attention(median_ms=-1), "median_ms must be above 1e-09; got -1."),
        (
            _attention(dtype=16),
            "dtype must be a string; got 16.",
        ),
        (
            _attention(direction="sideways"),
            "direction must be 'forward' or 'backward'; got 'sideways'.",
        ),
        (_attention(density=1.5), "density must be 1 or less; got 1.5."),
        (_attention(out_of_memory="yes"), "out_of_memory must be true or false; got 'yes'."),
        (
            _attention(out_of_memory=True, median_ms=None, peak_bytes=None),
            "out_of_memory needs capacity_bytes, the memory that was too small.",
        ),
        (
            _attention(out_of_memory=True, capacity_bytes=5),
            "out_of_memory has no time and no peak.",
        ),
        (
            _attention(median_ms=None, peak_bytes=None),
            "measured nothing: give median_ms, peak_bytes or both.",
        ),
        (
            {**MESSAGE, "operation": "broadcast"},
            "operation must be 'send_recv', 'all_gather', 'reduce_scatter', 'all_to_all' or"
            " 'all_reduce'; got 'broadcast'.",
        ),
        ({**MESSAGE, "min_ms": 3}, "min_ms is above median_ms."),
        ({**MESSAGE, "kind": "song"}, "a record of the kind 'song'."),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_its_number(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        _read(MESSAGE, row)
    assert str(caught.value).startswith(f"mine.jsonl, row 2: {message} Do: ")


def test_missing_and_unknown_fields_are_named_with_the_schema() -> None:
    with pytest.raises(ProfileError, match=r"row 1: field 'link' is missing; known are device,"):
        _read({k: v for k, v in MESSAGE.items() if k != "link"})
    with pytest.raises(ProfileError, match=r"row 1: unknown field 'colour'; known are device,"):
        _read({**MESSAGE, "colour": "red"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "mine.jsonl, row 1: line 1 is not JSON"),
        ("[1]\n", "mine.jsonl, row 1: a row must be an object with fields."),
        ("\n", "mine.jsonl holds no records."),
    ],
)
def test_a_file_of_something_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        read_records(text, "mine.jsonl")
    assert str(caught.value).startswith(message)
