"""The types of what is read from files: every number has its range, every text its form.

They annotate the fields of frozen dataclasses (plans, profiles, records), which pydantic checks
where a file is read (``ringfx.validation.json_reader``); a value that a program makes is not
checked again.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, TypeAlias

import torch
from pydantic import AfterValidator, ConfigDict, Field

__all__ = [
    "STRICT",
    "Bytes",
    "Count",
    "Date",
    "DeviceType",
    "Finite",
    "FloatDtype",
    "Gflops",
    "Kernels",
    "Level",
    "Milliseconds",
    "Name",
    "Power",
    "Ranks",
    "Rate",
    "Ratio",
    "Share",
    "Size",
    "SomeText",
    "Text",
    "Tokens",
    "UnitCost",
]

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""Of the outermost dataclass of a file; those inside follow. No value is converted to a type."""

# Upper ends are beyond anything that exists, and keep every sum and product finite.
Count: TypeAlias = Annotated[int, Field(ge=0, le=2**53)]
Power: TypeAlias = Annotated[int, Field(ge=0, le=4)]
"""Of a length."""
Size: TypeAlias = Annotated[int, Field(ge=1, le=2**31)]
"""Of one dim of a tensor."""
Tokens: TypeAlias = Annotated[int, Field(ge=1, le=2**44)]
Ranks: TypeAlias = Annotated[int, Field(ge=1, le=2**24)]
Bytes: TypeAlias = Annotated[int, Field(ge=0, le=10**24)]
Finite: TypeAlias = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
Milliseconds: TypeAlias = Annotated[float, Field(ge=0, le=1e24, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Level: TypeAlias = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
"""Of noise or a multiple: 0 or more."""
Gflops: TypeAlias = Annotated[float, Field(ge=0, le=1e24, allow_inf_nan=False)]
"""Billions of operations."""
Ratio: TypeAlias = Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)]
Rate: TypeAlias = Annotated[float, Field(ge=1e-6, le=1e12, allow_inf_nan=False)]
"""Gflops or GB a second."""
UnitCost: TypeAlias = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
"""Nanoseconds or microseconds of a byte, a pair, a call."""

_PRINTED = r"[^\x00-\x08\x0b-\x1f\x7f]"
Text: TypeAlias = Annotated[str, Field(pattern=rf"^{_PRINTED}*$")]
"""Without control characters but for tabs and line ends; it may be empty."""
SomeText: TypeAlias = Annotated[str, Field(pattern=rf"^{_PRINTED}+$")]
_PICK = r"[A-Za-z_][\w.\-]*( \(masked: [A-Za-z_][\w.\-]*\))?"
Kernels: TypeAlias = Annotated[
    str, Field(pattern=rf"^{_PICK}( forward, {_PICK} backward)?$", max_length=400)
]
"""Such as ``cuda_flash``, ``cuda_cudnn (masked: cuda_efficient) forward, cuda_flash backward``."""
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.\-]*$", max_length=200)]


def _device_type(text: str) -> str:
    try:
        return torch.device(text).type
    except RuntimeError as error:
        raise ValueError(f"{text!r:.60} is no device type of torch, such as cpu, cuda") from error


DeviceType: TypeAlias = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40), AfterValidator(_device_type)
]
"""Such as ``cpu``, ``cuda``."""


DTYPES = ("float64", "float32", "bfloat16", "float16")


def _float_dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(f"{text!r:.60} is not one of {', '.join(DTYPES)}")
    return text


FloatDtype: TypeAlias = Annotated[str, AfterValidator(_float_dtype)]
"""As torch names it without the prefix."""


def _iso_date(text: str) -> str:
    if text and not (re.fullmatch(r"\d{4}-\d\d-\d\d", text) and _is_date(text)):
        raise ValueError(f"date {text!r:.60} is not of the form 2026-11-23")
    return text


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


Date: TypeAlias = Annotated[str, AfterValidator(_iso_date)]
"""Such as 2026-11-23; empty: unknown."""
