"""What happens to an output after its keys are all merged: sinks, and rows without any key.

Both act on whole rows, so they are the same for every strategy.

Shapes: B batch, H query heads, G key/value heads, Q local queries, K local keys, E head dim of v.
"""

from __future__ import annotations

import logging
import math

import torch

from ringfx.errors import InvalidArgument
from ringfx.ops.kernels.kernel import accumulation_dtype
from ringfx.ops.kernels.logsumexp import lost, lost_range
from ringfx.ops.tiling.attention_call import Problem

__all__ = [
    "add_sinks",
    "fill_mean",
    "fill_nan",
    "lost_rows",
    "mean_gradient",
    "nan_gradient",
    "refuse_lost_digits",
    "sink_gradient",
    "warn_of_lost_digits",
]

Tensor = torch.Tensor
log = logging.getLogger("ringfx")
_WARNED: set[str] = set()
"""Layers that were warned of: once each."""


def add_sinks(out_BHQE: Tensor, lse_BHQ: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit a head joins the softmax and attends nothing: the output shrinks."""
    sinks_BHQ = sinks_H.to(lse_BHQ.dtype)[None, :, None].expand_as(lse_BHQ)
    share_BHQ = torch.sigmoid(lse_BHQ - sinks_BHQ)
    return out_BHQE.mul_(share_BHQ[..., None]), torch.logaddexp(lse_BHQ, sinks_BHQ)


def sink_gradient(dout_BHQE: Tensor, out_BHQE: Tensor, lse_BHQ: Tensor, sinks_H: Tensor) -> Tensor:
    """d loss / d sink, this rank's share: -sum of exp(sink - lse) * sum_e dout * out."""
    kept_in = accumulation_dtype(dout_BHQE.dtype)
    delta_BHQ = (dout_BHQE.to(kept_in) * out_BHQE.to(kept_in)).sum(-1)
    share_BHQ = torch.exp(sinks_H.to(kept_in)[None, :, None] - lse_BHQ)
    return -(share_BHQ * delta_BHQ).sum((0, 2))


def _without_keys(problem: Problem, lse_BHQ: Tensor) -> Tensor:
    """Rows of real queries (not padding) that no key was kept for."""
    return (lse_BHQ == -math.inf) & problem.is_query(lse_BHQ.device)


def _real_keys(problem: Problem, device: torch.device) -> Tensor:
    layout = problem.kv_layout
    return layout.positions(problem.ranks.rank, device) < layout.length


def fill_mean(problem: Problem, out_BHQE: Tensor, lse_BHQ: Tensor, v_BGKE: Tensor) -> None:
    """Rows without any key become the mean of all values, as a finfo.min mask makes them."""
    real_K = _real_keys(problem, v_BGKE.device)
    sum_BGE = v_BGKE.to(out_BHQE.dtype)[:, :, real_K].sum(2)
    sum_BGE = problem.ranks.all_reduce("forward: mean of v", sum_BGE)
    groups = out_BHQE.shape[1] // v_BGKE.shape[1]
    mean_BHE = (sum_BGE / problem.spec.kv_len).repeat_interleave(groups, dim=1)
    rows_BHQ = _without_keys(problem, lse_BHQ)
    out_BHQE.copy_(torch.where(rows_BHQ[..., None], mean_BHE[:, :, None], out_BHQE))


def mean_gradient(problem: Problem, dv_BGKE: Tensor, dout_BHQE: Tensor, lse_BHQ: Tensor) -> None:
    """Adds what the rows of ``fill_mean`` give to every value."""
    rows_BHQ = _without_keys(problem, lse_BHQ)
    sum_BHE = (dout_BHQE.to(dv_BGKE.dtype) * rows_BHQ[..., None]).sum(2)
    sum_BGE = sum_BHE.view(*dv_BGKE.shape[:2], -1, dv_BGKE.shape[3]).sum(2)
    if not problem.whole_queries:
        sum_BGE = problem.ranks.all_reduce("backward: mean of v", sum_BGE)
    real_K = _real_keys(problem, dv_BGKE.device)
    dv_BGKE.add_((sum_BGE / problem.spec.kv_len)[:, :, None] * real_K[None, None, :, None])


def lost_rows(lse_BHQ: Tensor) -> Tensor:
    """[B, H, Q, 1]: rows that no key was kept for."""
    return (lse_BHQ == -math.inf)[..., None]


def warn_of_lost_digits(problem: Problem, lse_BHQ: Tensor) -> None:
    """Say once where a bias hides rows so low that even their logsumexp has lost its digits."""
    layer = problem.ranks.layer
    if layer in _WARNED or not bool(lost(lse_BHQ).any()):
        return
    _WARNED.add(layer)
    log.warning(_lost_digits(layer))


def refuse_lost_digits(problem: Problem, lse_BHQ: Tensor, dout_BHQE: Tensor) -> None:
    """Raises on all ranks where gradients of such rows are asked for, and would be far off."""
    wrong_BHQ = lost(lse_BHQ) & (dout_BHQE != 0).any(-1)
    if _on_any_rank(problem, "backward: lost digits", wrong_BHQ):
        raise InvalidArgument(_lost_digits(problem.ranks.layer))


def _on_any_rank(problem: Problem, operation: str, found: Tensor) -> bool:
    """One answer for all, so that no rank waits for another that has raised."""
    return bool(problem.ranks.all_reduce(operation, found.any().float()) > 0)


def _lost_digits(layer: str) -> str:
    return (
        f"{layer or 'attention'}: a bias hides all keys of some queries with a number "
        f"{lost_range()}, beside which float64 keeps a few digits of their scores: the output and "
        "gradients of such a row are not those of the unsplit model. Do: mask with -inf, -1e9, "
        "finfo.min or a bool mask, or leave such rows out of the loss."
    )


def fill_nan(problem: Problem, out_BHQE: Tensor, lse_BHQ: Tensor) -> None:
    """Rows without any key become NaN, as a plain softmax of -inf makes them; padding stays 0."""
    out_BHQE.masked_fill_(_without_keys(problem, lse_BHQ)[..., None], math.nan)


def nan_gradient(problem: Problem, dv_BGKE: Tensor, lse_BHQ: Tensor) -> None:
    """Weights of NaN make every value's gradient NaN."""
    rows_BHQ = _without_keys(problem, lse_BHQ)
    lost_BG = rows_BHQ.view(*dv_BGKE.shape[:2], -1).sum(2, dtype=dv_BGKE.dtype)
    lost_BG = problem.ranks.all_reduce("backward: rows without keys", lost_BG)
    dv_BGKE.masked_fill_((lost_BG > 0)[..., None, None], math.nan)
