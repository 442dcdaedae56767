"""The attention kernels as values in one table: which calls each takes; and a choice of them.

How a kernel runs is in ``ringfx/ops``, what it costs in profiles; both are keyed by its name. The
cost model asks this table before it names a kernel in a plan, and a run asks it again before it
takes the kernel that the plan named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ringfx.errors import RingfxError

__all__ = ["KERNEL_VARIABLE", "TABLE", "Call", "KernelChoice", "Limits", "Pick", "forced_kernel"]

KERNEL_VARIABLE = "RINGFX_CUDA_KERNEL"
"""Environment variable that names the kernel to take on CUDA, such as ``cuda_cudnn``."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is asked of a kernel."""

    dtype: str
    """As torch names it without the prefix."""
    head_dim: int = 0
    """The larger of those of q and of v."""
    masked: bool = False
    """Whether scores are added to or hidden, other than by a causal diagonal."""
    soft_cap: bool = False
    dropout: bool = False
    """Whether weights are dropped, by a key of their own (``ringfx/ops/kernels/dropout.py``)."""
    all_keys: bool = False
    """Whether one call meets all keys, as in the collective strategy."""
    capability: int | None = None
    """The card's compute capability times ten, such as 90; None: unknown, or no card."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """One kernel: where it may be taken."""

    name: str
    device: str
    """Device type; empty: any."""
    dtypes: Mapping[str, int]
    """The types that it takes, each with the least capability (times ten) that it needs for it."""
    families: tuple[int, ...] = ()
    """The only major capabilities that it runs on; empty: any."""
    largest_head_dim: int | None = None
    fewest_keys: int = 1
    masks: bool = False
    soft_caps: bool = False
    dropouts: bool = False
    all_keys_only: bool = False
    """Only where one call meets all keys."""
    package: str = ""
    """The module that must be installed beside torch."""
    implementation: str = ""
    """What must stand behind torch's flash operators meanwhile: one at a time in a process."""
    unasked: tuple[int, ...] | None = None
    """Major capabilities on which it is taken where nothing was measured; None: all."""

    def refusal(self, call: Call) -> str:
        """Why it does not take the call, in words; empty if it does."""
        if call.dtype not in self.dtypes:
            return f"it takes {' and '.join(self.dtypes)}, and q is {call.dtype}"
        if call.capability is not None and (why := self._too_old(call.dtype, call.capability)):
            return why
        if self.largest_head_dim is not None and call.head_dim > self.largest_head_dim:
            return f"head dim {call.head_dim} is above its largest, {self.largest_head_dim}"
        if call.masked and not self.masks:
            return "it supports only the causal mask"
        if call.soft_cap and not self.soft_caps:
            return "it does not support a soft cap"
        if call.dropout and not self.dropouts:
            return "its dropout would depend on how tokens are split"
        if self.all_keys_only and not call.all_keys:
            return "it needs all keys in one call"
        return ""

    def _too_old(self, dtype: str, capability: int) -> str:
        least, card = self.dtypes[dtype], f"this card's is {capability / 10:.1f}"
        if self.families and capability // 10 not in self.families:
            known = " or ".join(f"{major}.x" for major in self.families)
            return f"it needs compute capability {known}, and {card}"
        if capability < least:
            return f"it needs compute capability {least / 10:.1f} for {dtype}, and {card}"
        return ""


HALVES = {"float16": 80, "bfloat16": 80}
SINGLES = {"float16": 50, "bfloat16": 80, "float32": 50}
EVERY = {"float16": 0, "bfloat16": 0, "float32": 0, "float64": 0}

_ROWS = (
    Limits(name="cpu_flash", device="cpu", dtypes=EVERY, masks=True),
    Limits(
        name="cuda_xformers",
        device="cuda",
        dtypes=SINGLES,
        largest_head_dim=256,  # beyond it xformers has forward kernels only
        all_keys_only=True,
        package="xformers",
    ),
    Limits(
        name="cuda_flash3",
        device="cuda",
        dtypes=HALVES,
        families=(9,),
        largest_head_dim=256,
        package="flash_attn_interface",
        implementation="FA3",
    ),
    Limits(
        name="cuda_flash4",
        device="cuda",
        dtypes=HALVES,
        families=(9, 10),
        largest_head_dim=128,  # what all of its cards take
        package="flash_attn.cute",
        implementation="FA4",
    ),
    Limits(
        name="cuda_cudnn",
        device="cuda",
        dtypes=HALVES,
        largest_head_dim=128,  # what all of its cards take
        fewest_keys=2,
        unasked=(9, 10),  # where torch itself prefers it
    ),
    Limits(
        name="cuda_flash",
        device="cuda",
        dtypes=HALVES,
        largest_head_dim=256,
        implementation="FA2",
    ),
    Limits(name="cuda_efficient", device="cuda", dtypes=SINGLES, masks=True),
    Limits(name="math", device="", dtypes=EVERY, masks=True, soft_caps=True, dropouts=True),
)
TABLE: Mapping[str, Limits] = {row.name: row for row in _ROWS}
"""By name. The order is that of published figures (H100, forward and backward: FlashAttention 3
610 TFLOP/s, cuDNN 505 to 540, FlashAttention 2 340), for where nothing was measured."""


def forced_kernel(call: Call) -> str | None:
    """The CUDA kernel that ``RINGFX_CUDA_KERNEL`` names; None where it names none.

    Float64, soft caps and dropout have but the reference, whatever is named. Pieces with a mask
    that it does not take are left to another kernel.

    Raises
    ------
    RingfxError
        The name is unknown, or that kernel does not take such a call.
    """
    name = os.environ.get(KERNEL_VARIABLE)
    if not name or call.soft_cap or call.dropout or call.dtype == "float64":
        return None
    call = replace(call, masked=False, all_keys=True)
    rows = [row for row in TABLE.values() if row.device in ("cuda", "")]
    known = {row.name: row.refusal(call) for row in rows}
    why = known.get(name, "there is no such kernel for CUDA")
    if why:
        able = ", ".join(other for other, refusal in known.items() if not refusal)
        raise RingfxError(
            f"{KERNEL_VARIABLE}={name}: {why}. Do: name one of {able}, or unset the variable."
        )
    return name


# --- a choice -----------------------------------------------------------------------------------

PICK = r"(\w[\w.\-]*)(?: \(masked: (\w[\w.\-]*)\))?"


@dataclass(frozen=True)
class Pick:
    """The kernels of one direction of a layer."""

    plain: str
    """For pieces without a mask, and for the others too where ``masked`` is empty."""
    masked: str = ""

    @staticmethod
    def of(plain: str, masked: str) -> Pick:
        """With the second left out where it is the first."""
        return Pick(plain, "" if masked == plain else masked)

    @property
    def text(self) -> str:
        return f"{self.plain} (masked: {self.masked})" if self.masked else self.plain

    @property
    def names(self) -> tuple[str, ...]:
        return (self.plain, self.masked) if self.masked else (self.plain,)


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """The kernels of a layer, as a plan names them and a run takes them.

    >>> KernelChoice.of("cuda_flash").backward
    Pick(plain='cuda_flash', masked='')
    >>> KernelChoice.of("cuda_flash forward, cuda_cudnn (masked: cuda_efficient) backward").text
    'cuda_flash forward, cuda_cudnn (masked: cuda_efficient) backward'
    """

    forward: Pick
    backward: Pick

    @property
    def text(self) -> str:
        """One word where one kernel does it all; ``of`` reads it back."""
        if self.forward == self.backward:
            return self.forward.text
        return f"{self.forward.text} forward, {self.backward.text} backward"

    def all_by(self, name: str) -> KernelChoice:
        """The same with one kernel for all that it takes."""

        def pick(old: Pick) -> Pick:
            return Pick.of(name, "" if TABLE[name].masks else old.masked)

        return KernelChoice(forward=pick(self.forward), backward=pick(self.backward))

    @property
    def can_run_together(self) -> bool:
        """Whether torch's flash operators need not be given to another within the layer."""
        names = (*self.forward.names, *self.backward.names)
        rows = [TABLE[name] for name in names if name in TABLE]
        return len({row.implementation for row in rows} - {""}) <= 1

    @staticmethod
    @lru_cache(maxsize=256)
    def of(text: str) -> KernelChoice:
        """The choice that ``text`` says."""
        match = re.fullmatch(rf"{PICK}(?: forward, {PICK} backward)?", text)
        if match is None:
            raise RingfxError(
                f"{text!r} names no kernels. Do: pass the text that a plan prints for its kernels."
            )
        plain, masked, *others = (name or "" for name in match.groups())
        forward = Pick(plain, masked)
        return KernelChoice(forward=forward, backward=Pick(*others) if others[0] else forward)
