"""Quantities as people write them: bytes, tokens, speeds."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ringfx.errors import InvalidArgument

__all__ = ["MOST_RANKS", "MOST_TOKENS", "parse_bytes", "parse_rate", "parse_tokens"]

MOST_BYTES = 2**60
MOST_TOKENS = 2**40
MOST_RANKS = 2**30
MOST_DIGITS = 30
"""What is beyond these is a slip of the finger, and no arithmetic of torch or of plans holds it."""

BYTE_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}

_SIZES = 'Do: give bytes as an integer, or a text such as "80GiB", "512 MiB" or "80GB".'
_COUNTS = 'Do: give one such as 4096, "128k" or "1M".'

_NUMBER_AND_UNIT = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Bytes from an integer or a text with a unit; KB is 1000 bytes, KiB 1024.

    >>> parse_bytes("80GiB"), parse_bytes("512 MiB"), parse_bytes("1.5kB"), parse_bytes(42)
    (85899345920, 536870912, 1500, 42)

    Raises
    ------
    InvalidArgument
        The text has no number, an unknown unit, or the size is not positive or beyond reason.
    """
    count = _bytes(size)
    if count <= 0:
        raise InvalidArgument(f"a memory size must be positive; got {_brief(size)}. {_SIZES}")
    if count > MOST_BYTES:
        raise InvalidArgument(f"a memory size is at most 2**60 bytes; got {_brief(size)}. {_SIZES}")
    return count


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    match = _NUMBER_AND_UNIT.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].lower() not in BYTE_UNITS or len(match[1]) > MOST_DIGITS:
        raise InvalidArgument(f"{_brief(size)} is not a memory size. {_SIZES}")
    return round(float(match[1].replace("_", "")) * BYTE_UNITS[match[2].lower()])


def parse_rate(text: str) -> float:
    """Bytes a second from a text such as ``50GB/s``; network speeds in bits as ``1Gbit/s``.

    >>> parse_rate("50GB/s"), parse_rate("100 Mbit/s"), parse_rate("1GiB/s")
    (50000000000.0, 12500000.0, 1073741824.0)

    Raises
    ------
    InvalidArgument
        The text is no speed, or it is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)/s\s*", text)
    unit = match[2].lower() if match else ""
    bits = unit.removesuffix("bit") + "b"
    factor = BYTE_UNITS.get(bits, 0) / 8 if unit.endswith("bit") else BYTE_UNITS.get(unit, 0)
    rate = float(match[1]) * factor if match and len(match[1]) <= MOST_DIGITS else 0.0
    if not rate:
        raise InvalidArgument(
            f'{_brief(text)} is not a speed. Do: give one such as "50GB/s" or "100Mbit/s".'
        )
    return rate


def parse_tokens(count: int | str) -> int:
    """A number of tokens; k and M are 1024 and 1024^2, as sequence lengths are spoken.

    >>> parse_tokens("8k"), parse_tokens("1M"), parse_tokens("1,000"), parse_tokens(251)
    (8192, 1048576, 1000, 251)

    Raises
    ------
    InvalidArgument
        The text is no number of tokens, or it is not positive or beyond reason.
    """
    tokens = count if isinstance(count, int) else _tokens(count)
    if tokens <= 0:
        raise InvalidArgument(
            f"a number of tokens must be positive; got {_brief(count)}. {_COUNTS}"
        )
    if tokens > MOST_TOKENS:
        raise InvalidArgument(
            f"a number of tokens is at most 2**40; got {_brief(count)}. {_COUNTS}"
        )
    return tokens


def _tokens(text: str) -> int:
    match = re.fullmatch(r"\s*(\d[\d_,]*)\s*([kKmM]?)\s*", text)
    if match is None or len(match[1]) > MOST_DIGITS:
        raise InvalidArgument(f"{_brief(text)} is not a number of tokens. {_COUNTS}")
    digits = match[1].replace(",", "").replace("_", "")
    return int(digits) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]


def _brief(given: object) -> str:
    """As it was given, or its beginning."""
    is_long = isinstance(given, int) and abs(given) > 10**60  # Python shows no 5,000 digits
    said = "a number of more than 60 digits" if is_long else repr(given)
    return said if len(said) <= 60 else f"{said[:57]}..."
