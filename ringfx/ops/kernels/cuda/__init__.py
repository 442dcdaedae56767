"""The fused kernels of an NVIDIA GPU, and which one is taken.

All return the natural logarithm of the softmax's sum. What the plan named is taken where the table
of kernels (``ringfx.ir.kernel_table``) and this machine admit it, else the next of the table that
they admit; what ``RINGFX_CUDA_KERNEL`` names is taken or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from ringfx.errors import RingfxError
from ringfx.ir.kernel_table import (
    KERNEL_VARIABLE,
    TABLE,
    Call,
    KernelChoice,
    Limits,
    Pick,
    forced_kernel,
)
from ringfx.ops.kernels.cuda import cudnn, flash, xformers
from ringfx.ops.kernels.cuda.efficient import EFFICIENT
from ringfx.ops.kernels.kernel import MATH, Kernel, Scores

__all__ = ["KERNEL_VARIABLE", "ROWS", "available", "capability", "choose", "refusals"]

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kernel of the table, as it runs here."""

    kernel: Kernel
    missing: Callable[[], str] = lambda: ""
    """What this machine lacks for it, in words; empty if nothing."""

    @property
    def limits(self) -> Limits:
        return TABLE[self.kernel.name]


ROWS: Mapping[str, Row] = {
    row.kernel.name: row
    for row in (
        Row(kernel=xformers.XFORMERS, missing=xformers.missing),
        Row(kernel=flash.FLASH3, missing=flash.missing3),
        Row(kernel=flash.FLASH4, missing=flash.missing4),
        Row(kernel=cudnn.CUDNN, missing=cudnn.missing),
        Row(kernel=flash.FLASH),
        Row(kernel=EFFICIENT),
        Row(kernel=MATH),
    )
}


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    all_keys: bool = False,
    head_dim: int = 0,
    named: str = "",
) -> Kernel:
    """What the plan named, as far as it can run here; without a plan, the first of the table.

    Parameters
    ----------
    all_keys
        Whether the call meets all keys at once, as in the collective strategy.
    head_dim
        The larger of those of q and of v.
    named
        ``KernelChoice.text`` of the plan's layer; empty: there is no plan.

    Raises
    ------
    RingfxError
        ``RINGFX_CUDA_KERNEL`` names a kernel that is unknown or cannot run here.
    """
    call = _call(device, dtype, all_keys=all_keys, head_dim=head_dim)
    wanted = KernelChoice.of(named) if named else NO_PLAN
    forced = _forced(call)
    if forced is not None:
        wanted, call = wanted.all_by(forced), replace(call, all_keys=True)
    return _joined(
        KernelChoice(forward=_pick(wanted.forward, call), backward=_pick(wanted.backward, call))
    )


def available(device: torch.device, dtype: torch.dtype) -> dict[str, Kernel]:
    """Every kernel that can run here, by name."""
    call = _call(device, dtype, all_keys=True)
    return {name: row.kernel for name, row in ROWS.items() if not _refusal(name, call)}


def refusals(
    named: str, device: torch.device, dtype: torch.dtype, *, all_keys: bool, head_dim: int
) -> tuple[str, ...]:
    """Why what the plan named cannot run here, one text a kernel; none where all of it can."""
    call, choice = (
        _call(device, dtype, all_keys=all_keys, head_dim=head_dim),
        KernelChoice.of(named),
    )
    plain = {choice.forward.plain: call, choice.backward.plain: call}
    masked = {pick.masked: replace(call, masked=True) for pick in (choice.forward, choice.backward)}
    asked = {name: x for name, x in (masked | plain).items() if name}
    whys = {name: _refusal(name, x) for name, x in asked.items()}
    return tuple(f"{name} cannot run here: {why}" for name, why in whys.items() if why)


@cache
def capability(device: torch.device) -> int | None:
    """The card's compute capability times ten; None on a machine without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# --- parts ------------------------------------------------------------------------------------


def _call(device: torch.device, dtype: torch.dtype, *, all_keys: bool, head_dim: int = 0) -> Call:
    return Call(
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        all_keys=all_keys,
        capability=capability(device),
    )


def _forced(call: Call) -> str | None:
    name = forced_kernel(call)
    if name is not None and (why := _refusal(name, replace(call, all_keys=True))):
        raise RingfxError(
            f"{KERNEL_VARIABLE}={name}: {why}. Do: install it, or unset the variable."
        )
    return name


def _refusal(name: str, call: Call) -> str:
    """Why a kernel cannot take the call on this machine; empty if it can."""
    row = ROWS.get(name)
    if row is None:
        return "it is no kernel for CUDA"
    return row.limits.refusal(call) or row.missing()


NO_PLAN = KernelChoice(forward=Pick(""), backward=Pick(""))


def _pick(wanted: Pick, call: Call) -> Pick:
    masked = wanted.masked and _next(wanted.masked, replace(call, masked=True))
    return Pick.of(_next(wanted.plain, call), masked)


def _next(wanted: str, call: Call) -> str:
    """That kernel, or the first of the table that can take the call here."""
    if wanted and not _refusal(wanted, call):
        return wanted
    return next(name for name in _unasked(call.capability) if not _refusal(name, call))


def _unasked(card: int | None) -> Iterator[str]:
    for name, row in ROWS.items():
        families = row.limits.unasked
        if families is None or (card is not None and card // 10 in families):
            yield name


@lru_cache(maxsize=64)
def _joined(choice: KernelChoice) -> Kernel:
    """One kernel of those that are chosen for forward and backward, plain and masked pieces."""
    forward, backward = choice.forward, choice.backward
    names = {*forward.names, *backward.names}
    if len(names) == 1:
        return ROWS[forward.plain].kernel

    def of(pick: Pick, scores: Scores) -> Kernel:
        is_masked = scores.bias_BHQK is not None and pick.masked
        return ROWS[pick.masked if is_masked else pick.plain].kernel

    def run_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        return of(forward, scores).forward(q, k, v, scores)

    def run_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        return of(backward, scores).backward(dout, q, k, v, out, lse, scores)

    return Kernel(
        name=choice.text,
        forward=run_forward,
        backward=run_backward,
        stores_scores=any(ROWS[name].kernel.stores_scores for name in names),
    )
