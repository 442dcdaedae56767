"""Profiles: what one kind of device and its links were measured or published to do.

A profile is a JSON file of rows. Each row says where its numbers come from, and a number that was
not measured says so. Nothing here predicts: ``ringfx.cost_model.prediction.predict`` reads these
rows.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import ClassVar, get_args

import torch
from pydantic import ConfigDict

from ringfx.cost_model.prediction import devices
from ringfx.cost_model.prediction.profile_checks import problems
from ringfx.cost_model.prediction.profile_rows import (
    Capability,
    Direction,
    KernelRow,
    Kind,
    LinkRow,
    MemoryRow,
    Operation,
    OverheadRow,
    ProductRow,
    Scope,
)
from ringfx.errors import InvalidArgument, ProfileError
from ringfx.units.age import age_days, age_words
from ringfx.units.argument import Argument
from ringfx.units.format import format_bytes
from ringfx.validation.fields import (
    STRICT,
    Date,
    DeviceType,
    Name,
    Rate,
    Ratio,
    Size,
    SomeText,
    Text,
    UnitCost,
)
from ringfx.validation.json_reader import Source, parse_json, shown, validated
from ringfx.validation.text_files import is_there, read_text

__all__ = [
    "LOCAL",
    "PROFILE_SCHEMA",
    "Profile",
    "available_profiles",
    "check_profile",
    "check_profile_type",
    "is_path",
    "load_profile",
    "own_profiles",
    "profile_json",
    "profiles_folder",
    "read_profile",
]

PROFILE_SCHEMA = 1

LOCAL = "local"
"""In place of a strategy's name: one rank."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The constants of one device class, with their origins."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: SomeText
    device: DeviceType
    """Device type: ``cpu``, ``cuda``."""
    device_name: SomeText
    """Part of the name that such devices give themselves."""
    kind: Kind
    origin: SomeText
    """Where the numbers come from, in one line that the plan prints."""
    ranks_per_node: Size
    memory_gbytes_per_s: Rate | None
    """Speed at which one rank reads and writes its own memory; None where nobody measured it."""
    memory_origin: SomeText
    fused_kernel: Name
    """The kernel whose rows stand in for one that has none."""
    kernels: tuple[KernelRow, ...]
    links: tuple[LinkRow, ...]
    products: tuple[ProductRow, ...] = ()
    """Empty: attention's kernel stands in."""
    elementwise_gbytes_per_s: Rate | None = None
    """What operators that are no products read and write; None: as ``memory_gbytes_per_s``."""
    fused_gbytes_per_s: Rate | None = None
    """What kernels of Inductor read and write; None: as ``elementwise_gbytes_per_s``."""
    elementwise_us: UnitCost = 0.0
    """What such an operator costs however small it is."""
    fresh_ns_per_byte: UnitCost = 0.0
    """What a byte of a large new tensor costs more: pages that the system gives on first touch."""
    optimizer_gbytes_per_s: Rate | None = None
    """What an optimizer's step reads and writes; None: as ``memory_gbytes_per_s``."""
    step_factor: Rate = 1.0
    """How much longer operators take within a step, run one by one, than timed alone."""
    fused_step_factor: Rate = 1.0
    """The same of a step that Inductor compiled."""
    device_gbytes: Rate | None = None
    """Memory of one device; None: not known."""
    host_gbytes_per_s: Rate | None = None
    """What one rank sends to the host's memory, or fetches from there; None: nothing is."""
    host_gbytes: Rate | None = None
    """How much of that memory one rank may use for what is offloaded."""
    host_origin: Text = ""
    mask_ns_per_pair: UnitCost = 0.0
    """What evaluating a mask costs for each pair of a tile that needs it, once for all heads."""
    mask_us_per_tile: UnitCost = 0.0
    """What evaluating a mask costs for each tile, whatever its size."""
    handling_ns_per_byte: UnitCost = 0.0
    """What a byte of a layer's buffers costs: packing, casting, first touch of new memory."""
    merge_us: UnitCost = 0.0
    """What merging a kernel call's output costs beyond the bytes it moves: launches on the host."""
    contention_ns_per_byte: UnitCost = 0.0
    """Compute lost to each byte that travels beside it: a CPU copies it, a GPU's cores drive it."""
    message_wait_us: UnitCost = 0.0
    """What a message within a step costs beyond its own time: ranks that compute between messages
    are never quite together, and a CPU's cores compute when a message comes."""
    overheads: tuple[OverheadRow, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    """Only in observed profiles; elsewhere memory follows from the formulas."""
    noise: Ratio = 1.0
    """Times whose ratio is below this are ties: the spread of a thing measured against itself."""
    date: Date = ""
    """When it was measured or put together, as 2026-11-23; empty: nobody knows."""
    capability: Capability = ""
    """The card's compute capability, such as 9.0; empty: unknown, or no card."""
    torch: Text = ""
    """The version of torch that it was measured with."""
    held_out: Text = ""
    """Error on layers that nothing was fitted to, in words; empty: nobody measured it."""
    quality: Text = ""
    """How well the constants fit what they were fitted to, in words."""
    notes: tuple[Text, ...] = ()
    """What a reader of the plan must know: the profile is foreign, or a default."""

    def kernel(self, name: str, dtype: str, direction: Direction) -> KernelRow:
        """The row of a kernel; of float32 where this dtype has none (``missing_rows`` says so)."""
        rows = self._kernel_rows.get((name, direction))
        if not rows:
            raise ProfileError(
                f"profile {self.name!r} has no row for the {name!r} kernel, {direction}."
                " Do: run `ringfx calibrate`, or use a profile that has one."
            )
        return rows.get(dtype) or rows.get("float32") or next(iter(rows.values()))

    @cached_property
    def kernel_names(self) -> tuple[str, ...]:
        """The kernels that have rows."""
        return tuple(dict.fromkeys(row.kernel for row in self.kernels))

    @cached_property
    def _kernel_rows(self) -> Mapping[tuple[str, Direction], Mapping[str, KernelRow]]:
        """The rows of a kernel, by dtype."""
        found: dict[tuple[str, Direction], dict[str, KernelRow]] = {}
        for row in self.kernels:
            found.setdefault((row.kernel, row.direction), {})[row.dtype] = row
        return found

    def product(self, dtype: str, direction: Direction) -> ProductRow:
        """The row of products in this type, or another; without any, at the speed of attention's
        kernel (``missing_rows`` says so)."""
        rows = {row.dtype: row for row in self.products if row.direction == direction}
        if rows:
            return rows.get(dtype) or rows.get("float32") or next(iter(rows.values()))
        row = self.kernel(self.fused_kernel, dtype, direction)
        return ProductRow(
            dtype=dtype, direction=direction, call_us=row.call_us, gflops=row.gflops,
            origin="as attention's kernel",
        )  # fmt: skip

    def overhead_us(self, strategy: str, direction: Direction) -> float:
        """Of a layer under a strategy; of one that nobody measured, that of the most expensive.

        0 where no strategy, or one rank, was measured.
        """
        rows = {row.strategy: row.layer_us for row in self.overheads if row.direction == direction}
        if strategy in rows:
            return rows[strategy]
        others = (us for name, us in rows.items() if LOCAL not in (name, strategy))
        return max(others, default=0.0)

    def link(self, operation: Operation, world_size: int) -> LinkRow:
        """The row of the slowest link that the collective crosses.

        A profile of one machine has no other row than its own: it stands for more ranks too.
        """
        scope: Scope = "node" if world_size <= self.ranks_per_node else "network"
        rows = {row.scope: row for row in self.links if row.operation == operation}
        if not rows:
            raise ProfileError(
                f"profile {self.name!r} has no row for {operation!r}: it cannot predict"
                f" {world_size} ranks. Do: run `ringfx calibrate` with 2 ranks or more, or use a"
                " profile that has one."
            )
        return rows.get(scope) or next(iter(rows.values()))

    def budget_doubts(self, budget: int | None) -> tuple[str, ...]:
        """That a budget is larger than the device's memory."""
        if budget is None or self.device_gbytes is None or budget <= 1e9 * self.device_gbytes:
            return ()
        return (
            f"the budget is {format_bytes(budget)}, but a device of profile {self.name} has "
            f"{format_bytes(1e9 * self.device_gbytes)}: what is planned may not fit it",
        )

    def missing_rows(self, dtypes: Iterable[str]) -> tuple[str, ...]:
        """One note for each dtype that is predicted with another dtype's figures."""
        known = {row.dtype for row in self.kernels}
        missing = tuple(
            f"profile {self.name} has no {dtype} kernels: float32 figures are used instead"
            for dtype in sorted(set(dtypes) - known)
        )
        if self.products:
            return missing
        return (
            *missing,
            f"profile {self.name} has no matrix products: attention's kernel stands in for them;"
            " `ringfx calibrate` measures them",
        )


def load_profile(name: str | Path | Profile | None = None, *, device: str) -> Profile:
    """The profile to predict with; what is doubtful about it is said in its ``notes``.

    Parameters
    ----------
    name
        A shipped profile's name, a path to a JSON file, or None to find the one of this device. A
        profile that was loaded before is returned as it is.
        A profile that is named may be of another device type, to plan for a machine not at hand.
    device
        Type of the device that holds the model's tensors: ``cpu``, ``cuda``.

    Raises
    ------
    ProfileError
        There is no such profile, it cannot be read, or none ships for this device type.
    """
    if not isinstance(device, str) or not device:
        raise InvalidArgument(f"device={shown(device)} is not a device type. Do: give cpu or cuda.")
    check_profile_type(name)
    if isinstance(name, Profile):
        return name
    profile = _find(device) if name is None else _named(name)
    words = (profile.origin, profile.quality, profile.held_out)
    origin = "; ".join(filter(None, words))
    notes = profile.notes + _doubts(profile, device)
    return dataclasses.replace(profile, origin=origin, notes=notes)


@cache
def available_profiles() -> tuple[Profile, ...]:
    """All profiles that ship with ringfx, by name."""
    folder = resources.files("ringfx.cost_model") / "profiles"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(read_profile(f.read_text("utf-8"), f.name) for f in files)


def profiles_folder() -> Path:
    """Where this user's calibrations lie: $RINGFX_PROFILES, else in the configuration folder."""
    if "RINGFX_PROFILES" in os.environ:
        return Path(os.environ["RINGFX_PROFILES"])
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(config) / "ringfx" / "profiles"


def own_profiles() -> tuple[Profile, ...]:
    """The profiles that ``ringfx calibrate`` wrote for this user, by file name.

    A file that cannot be read is left out, with one warning that names it.
    """
    files = sorted(profiles_folder().glob("*.json"))
    found = (_own_profile(file) for file in files)
    return tuple(profile for profile in found if profile is not None)


_WARNED: set[str] = set()
"""What was said about files, so that it is said once."""


def _own_profile(file: Path) -> Profile | None:
    try:
        return _read_file(file)
    except ProfileError as error:
        if str(error) not in _WARNED:
            _WARNED.add(str(error))
            logging.getLogger("ringfx").warning("left out: %s", error)
        return None


def _read_file(file: Path) -> Profile:
    return read_profile(read_text(file, ProfileError, "profile"), str(file))


def read_profile(text: str, where: str) -> Profile:
    """A profile from the text of its file; ``where`` names the file in errors.

    Raises
    ------
    ProfileError
        The text is no JSON, has another schema version, or a field is missing or wrong.
    """
    source = Source(
        where=f"profile {where}",
        damaged=f"profile {where} is damaged",
        error=ProfileError,
        remedy="write it again with `ringfx calibrate`",
    )
    fields = parse_json(text, source)
    schema = fields.pop("schema", None) if isinstance(fields, dict) else None
    if isinstance(schema, bool) or schema != PROFILE_SCHEMA:
        raise ProfileError(
            f"profile {where} has schema version {shown(schema)}; this ringfx reads version"
            f" {PROFILE_SCHEMA}. Do: write it again with `ringfx calibrate`."
        )
    return validated(Profile, fields, source, problems)


def profile_json(profile: Profile) -> str:
    """The text of a profile's file; ``read_profile`` gives an equal value back."""
    fields = {"schema": PROFILE_SCHEMA, **dataclasses.asdict(profile)}
    return json.dumps(fields, indent=1) + "\n"


def _find(device: str) -> Profile:
    """The most trustworthy profile of this very device, else of its type; the user's own first."""
    everything = (*own_profiles(), *available_profiles())
    candidates = [p for p in everything if p.device == device and p.kind != "observed"]
    if not candidates:
        known = sorted({p.device for p in available_profiles()})
        raise ProfileError(
            f"ringfx has no profile for devices of type {device!r}, only for {', '.join(known)}. "
            "Do: run `ringfx calibrate`, and pass its file, "
            f"{Argument('profile', 'mine.json')}."
        )
    kinds = get_args(Kind)
    return min(
        candidates, key=lambda p: (not _is_own(p), kinds.index(p.kind), p.name not in STAND_INS)
    )


STAND_INS = ("h100-sxm-published",)
"""Of several equally trustworthy profiles of other devices, the one that stands in."""


def check_profile(name: object) -> None:
    """Refuses now what ``load_profile`` would refuse later.

    Raises
    ------
    InvalidArgument
        It is neither a name nor a path.
    ProfileError
        There is no such profile, or it cannot be read.
    """
    check_profile_type(name)
    if isinstance(name, str | Path):
        _named(name)


def is_path(name: object) -> bool:
    """Whether it says a file rather than the name of a profile."""
    return isinstance(name, Path) or (isinstance(name, str) and Path(name).name != name)


def check_profile_type(name: object) -> None:
    """Raises InvalidArgument for what is no name, path or profile."""
    if name is not None and not isinstance(name, Profile | str | Path):
        raise InvalidArgument(
            f"profile is {shown(name)}, a {type(name).__name__}. Do: give the name of a profile, "
            "the path of a file, or a result of load_profile."
        )


def _named(name: str | Path) -> Profile:
    known = {p.name: p for p in (*available_profiles(), *own_profiles())}
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    in_folder = profiles_folder() / f"{name}.json"
    if path.suffix != ".json" and not is_there(path):
        if path.name == str(name) and is_there(in_folder):
            return _read_file(in_folder)
        raise ProfileError(
            f"there is no profile {str(name)!r}. Known: {', '.join(sorted(known))}."
            " Do: name one of these, or give the path of a file written by `ringfx calibrate`."
        )
    return _read_file(path)


def _is_own(profile: Profile) -> bool:
    name = devices.device_name(profile.device)
    return name is not None and profile.device_name in name


def _doubts(profile: Profile, device: str) -> tuple[str, ...]:
    """What a reader of the plan must know before believing its times."""
    doubts = []
    if profile.device != device:
        doubts.append(
            f"the model's tensors are on {device}, but profile {profile.name} is for "
            f"{profile.device}: the times are those of {profile.device}"
        )
    here = devices.device_name(profile.device)
    if profile.device == device and not _is_own(profile):
        this = (
            f"this machine has {here}" if here else f"this machine has no {profile.device} device"
        )
        doubts.append(
            f"profile {profile.name} describes {profile.device_name}, but {this}: the times are "
            "those of the profile's device"
        )
    if profile.kind == "observed":
        doubts.append(
            f"profile {profile.name} was measured on other code than ringfx: it predicts the cost "
            "of that code"
        )
    elif profile.kind != "measured":
        doubts.append(
            f"profile {profile.name} is {profile.kind}, not measured:"
            " `ringfx calibrate` measures the device it runs on"
        )
    return (*doubts, *_stale(profile))


def _stale(profile: Profile) -> Iterator[str]:
    """A measurement with other software, or of long ago."""
    here = torch.__version__.split("+")[0]
    if profile.torch and profile.torch != here:
        yield (
            f"profile {profile.name} was measured with torch {profile.torch}, but this is {here}: "
            "`ringfx calibrate` measures again"
        )
    if profile.kind == "measured" and (age_days(profile.date) or 0) > OLD_DAYS:
        yield (
            f"profile {profile.name} is {age_words(profile.date)}: drivers and machines change;"
            " `ringfx calibrate` measures again"
        )


OLD_DAYS = 365
