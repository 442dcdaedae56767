from __future__ import annotations

import pytest

from ringfx.cost_model import parse_bytes, parse_tokens
from ringfx.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GiB", 80 * 2**30),
        ("80 GiB", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5gib", 3 * 2**29),
        ("1_000", 1000),
        (12345, 12345),
    ],
)
def test_bytes_are_read_with_binary_and_decimal_units(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "80 gigs", "-1GiB", "1e9", "80GiB2", 1.5, None, True])
def test_what_is_no_memory_size_is_refused_with_examples(text: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_bytes(text)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"{text!r} is not a memory size."
        ' Do: give bytes as an integer, or a text such as "80GiB", "512 MiB" or "80GB".'
    )


@pytest.mark.parametrize("size", [0, -5, "0GiB"])
def test_a_memory_size_is_positive(size: int | str) -> None:
    with pytest.raises(InvalidArgument, match=r"must be positive; got"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("text", "count"), [("8k", 8192), ("1M", 2**20), ("1,048,576", 2**20), ("251", 251), (7, 7)]
)
def test_tokens_are_read_as_they_are_spoken(text: int | str, count: int) -> None:
    assert parse_tokens(text) == count


def test_what_is_no_number_of_tokens_is_refused_with_examples() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_tokens("many")
    assert str(caught.value) == (
        '\'many\' is not a number of tokens. Do: give one such as 4096, "128k" or "1M".'
    )
    with pytest.raises(InvalidArgument, match="must be positive; got '0'"):
        parse_tokens("0")
