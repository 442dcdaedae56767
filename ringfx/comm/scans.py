"""Scans along the tokens: each run is scanned alone, and one value of it is exchanged.

With y_c the scan of run c and t_c its last element, the scan of all runs is

    y_c joined with t_0 joined ... with t_(c-1)

where to join is to add, to multiply, or to take the larger. The gradient goes back the same way: to
an earlier run as one value, the sum over all that came after it.

Shapes: a dimension ``dim`` is [tokens, inner], a rank's tokens are ``chunks`` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ringfx.comm.conjugate import choose_tokens, identity_grad_all_reduce, mask_tokens, sum_partials

__all__ = ["SCANS", "scan_tokens", "scan_with_places"]

Tensor = torch.Tensor


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min / 2


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """An associative operation along a dimension."""

    scan: Callable[[Tensor, int], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    neutral: Callable[[torch.dtype], float]
    """What changes nothing: padding holds it."""


SCANS: Mapping[str, _Scan] = {
    "cumsum": _Scan(scan=torch.cumsum, join=torch.add, neutral=lambda dtype: 0.0),
    "cumprod": _Scan(scan=torch.cumprod, join=torch.mul, neutral=lambda dtype: 1.0),
    # Not -inf, of which the derivative of a logarithm of nothing is NaN.
    "logcumsumexp": _Scan(scan=torch.logcumsumexp, join=torch.logaddexp, neutral=_lowest),
}


def scan_tokens(
    x: Tensor, own: Tensor, length: int, scan: str, dtype: torch.dtype, offset: int,
    chunks: int, ranks: int, group: str, dim: int, inner: int, what: str,
) -> Tensor:  # fmt: skip
    """``cumsum``, ``cumprod`` or ``logcumsumexp`` along ``dim``.

    Parameters
    ----------
    own
        int64 [local tokens]: which token of the axis each local token is; padding is outside
        0 .. length - 1.
    offset
        Where on its line the axis starts.
    """
    kind, valid = SCANS[scan], (own >= 0) & (own < length)
    x = x.to(dtype)
    runs = _runs(mask_tokens(x, valid, kind.neutral(dtype), dim, 1, inner), chunks, dim)
    found = kind.scan(runs, dim + 1)
    number = _numbers(own, offset, chunks)
    totals = _exchanged(found.select(dim + 1, -1), number, chunks * ranks, group, dim, what)
    before = kind.scan(totals, dim).index_select(dim, (number - 1).clamp_min(0))
    joined = torch.where(
        _along(number == 0, found, dim), found, kind.join(found, before.unsqueeze(dim + 1))
    )
    return choose_tokens(joined.flatten(dim, dim + 1), x.detach(), valid, dim, 1, inner)


def scan_with_places(
    x: Tensor, own: Tensor, length: int, scan: str, offset: int,
    chunks: int, ranks: int, group: str, dim: int, inner: int, what: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``cummax`` or ``cummin`` along ``dim``, and the place of each result, the last of equals."""
    valid = (own >= 0) & (own < length)
    is_max = scan == "cummax"
    scanned = torch.cummax if is_max else torch.cummin
    runs = _runs(mask_tokens(x, valid, _worst(x.dtype, is_max), dim, 1, inner), chunks, dim)
    found, place = scanned(runs, dim + 1)
    number = _numbers(own, offset, chunks)
    first = own.view(chunks, -1)[:, 0] * inner
    place = place + _along(first, place, dim)
    totals = _exchanged(found.select(dim + 1, -1), number, chunks * ranks, group, dim, what)
    places = _exchanged(place.select(dim + 1, -1), number, chunks * ranks, group, dim, what)
    before, run = scanned(totals, dim)
    earlier = (number - 1).clamp_min(0)
    carried = before.index_select(dim, earlier).unsqueeze(dim + 1)
    its_place = places.gather(dim, run).index_select(dim, earlier).unsqueeze(dim + 1)
    is_own = (found >= carried) if is_max else (found <= carried)
    is_own = is_own | (found.isnan() if found.is_floating_point() else False)
    is_own = is_own | _along(number == 0, found, dim)
    values, where = torch.where(is_own, found, carried), torch.where(is_own, place, its_place)
    place_of = (dim, 1, inner)
    return (
        choose_tokens(values.flatten(dim, dim + 1), x.detach(), valid, *place_of),
        mask_tokens(where.flatten(dim, dim + 1), valid, 0, *place_of),
    )


def _runs(x: Tensor, chunks: int, dim: int) -> Tensor:
    runs: Tensor = x.unflatten(dim, (chunks, x.shape[dim] // chunks))
    return runs


def _numbers(own: Tensor, offset: int, chunks: int) -> Tensor:
    """int64 [chunks]: which run of its line each run of this rank is."""
    found: Tensor = (own.view(chunks, -1)[:, 0] + offset) // (own.shape[0] // chunks)
    return found


def _along(per_run: Tensor, like: Tensor, dim: int) -> Tensor:
    """[chunks] as it broadcasts to runs."""
    return per_run.view(-1, *(1,) * (like.dim() - dim - 1))


def _exchanged(mine: Tensor, number: Tensor, total: int, group: str, dim: int, what: str) -> Tensor:
    """One value of every run of all ranks, in order: a sum with zeros."""
    shape = (*mine.shape[:dim], total, *mine.shape[dim + 1 :])
    placed = mine.new_zeros(shape).index_copy(dim, number, mine)
    return identity_grad_all_reduce(sum_partials(placed, group, what), group, what)


def _worst(dtype: torch.dtype, is_max: bool) -> float | int:
    if dtype.is_floating_point:
        return -torch.inf if is_max else torch.inf
    info = torch.iinfo(dtype)
    return info.min if is_max else info.max
