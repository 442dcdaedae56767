"""Local attention of one tile, and its backward: the one interface to every kernel.

    forward    (q, k, v) -> out, lse       lse = log sum_k exp(score), natural logarithm
    backward   (dout, q, k, v, out, lse) -> dq, dk, dv

The backward takes the output and logsumexp of the *whole* row, not of the tile: with
P = exp(score - lse) and D = sum_d dout * out, a tile's dS = P * (dout v^T - D), so the gradients of
all tiles add up exactly (Dao et al., FlashAttention; Liu et al., Ring Attention). A row without any
key in the tile has out 0 and lse -inf.

Shapes: B batch, H query heads, G key/value heads (H % G == 0), Q queries, K keys, D and E the head
dims of q, k and of v.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch.nn import functional as F

from ringfx.ops.kernels.dropout import drop_
from ringfx.ops.kernels.logsumexp import is_deep, stepped
from ringfx.torch_compat.processor import multiplies_bfloat16_avx512, multiplies_matrices

__all__ = [
    "CPU_FLASH",
    "MATH",
    "Kernel",
    "ScoreMap",
    "Scores",
    "accumulation_dtype",
    "available",
    "choose",
    "computed_in",
    "finite",
    "math_backward",
    "same_head_dims",
    "why_not",
]

aten = torch.ops.aten
Tensor: TypeAlias = torch.Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over tiles are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ScoreMap(Protocol):
    """A function of each score of a tile by itself."""

    def values(self, s_BHQK: Tensor) -> Tensor: ...

    def pulled(self, ds_BHQK: Tensor, s_BHQK: Tensor) -> Tensor:
        """The gradient of the scores, given that of the values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How a tile's products become scores, map(cap(scale * q k^T)) + bias, and these weights."""

    scale: float
    causal: bool = False
    """Query i attends keys 0..i; as many queries as keys."""
    bias_BHQK: Tensor | None = None
    """Added to the scores, in the accumulation dtype, broadcastable; -inf where not attended."""
    soft_cap: float | None = None
    map: ScoreMap | None = None
    """For MATH alone."""
    slope_BHQK: Tensor | None = None
    """Shares of their gradient that scores get; those of none count as 0. For MATH alone."""
    kept_BHQK: Tensor | None = None
    """int32: 0 for weights that are 0 after the softmax, -1 for others. For MATH alone."""
    share_kept: float = 1.0
    """Divides the others: how many are kept on average."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """``forward(q, k, v, scores)`` and ``backward(dout, q, k, v, out, lse, scores)``."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Scores], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Scores], tuple[Tensor, Tensor, Tensor]
    ]
    stores_scores: bool
    """Whether a tile's scores are kept in memory, so that tiles must be bounded."""


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    soft_cap: bool = False,
    math_only: bool = False,
    all_keys: bool = False,
    head_dim: int = 0,
    named: str = "",
) -> Kernel:
    """The kernel for a device that returns a logsumexp and can do what is asked.

    Parameters
    ----------
    soft_cap
        Or any other function of single scores.
    all_keys
        One call meets all keys, as in the collective strategy.
    head_dim
        The larger of those of q and of v.
    named
        What the plan counts on (``KernelChoice.text``): it is taken wherever it can run here.
    """
    if math_only or soft_cap:
        return MATH
    if device.type == "cpu":
        return CPU_FLASH
    if device.type == "cuda":
        from ringfx.ops.kernels import cuda

        return cuda.choose(device, dtype, all_keys=all_keys, head_dim=head_dim, named=named)
    return MATH


def available(device: torch.device, dtype: torch.dtype) -> dict[str, Kernel]:
    """Every kernel of a device that can run here, by name, for a type."""
    if device.type == "cpu":
        return {CPU_FLASH.name: CPU_FLASH}
    if device.type == "cuda":
        from ringfx.ops.kernels import cuda

        return cuda.available(device, dtype)
    return {MATH.name: MATH}


def why_not(
    named: str, device: torch.device, dtype: torch.dtype, *, all_keys: bool, head_dim: int
) -> tuple[str, ...]:
    """Why kernels that a plan named cannot run on a GPU, one text each; none where all can."""
    if device.type != "cuda":
        return ()
    from ringfx.ops.kernels import cuda

    return cuda.refusals(named, device, dtype, all_keys=all_keys, head_dim=head_dim)


# --- math: the reference ------------------------------------------------------------------------


def _grouped(x_BHQD: Tensor, groups: int) -> Tensor:
    """[B, H, Q, D] -> [B, G, H/G * Q, D]: the query heads of one K/V head become its rows."""
    B, H, Q, D = x_BHQD.shape
    return x_BHQD.reshape(B, groups, H // groups * Q, D)


def _math_scores(
    q_BHQD: Tensor, k_BGKD: Tensor, scores: Scores
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scores [B, H, Q, K] in the accumulation dtype; with a cap tanh(score / cap), with a map what
    it was given."""
    B, H, Q, _ = q_BHQD.shape
    K = k_BGKD.shape[2]
    kept_in = accumulation_dtype(q_BHQD.dtype)
    q_BGRD = _grouped(q_BHQD.to(kept_in), k_BGKD.shape[1])
    s_BHQK = (q_BGRD @ k_BGKD.to(kept_in).transpose(-1, -2)).view(B, H, Q, K).mul_(scores.scale)
    tanh_BHQK = None
    if scores.soft_cap is not None:
        tanh_BHQK = (s_BHQK / scores.soft_cap).tanh_()
        s_BHQK = tanh_BHQK * scores.soft_cap
    given_BHQK = None
    if scores.map is not None:
        given_BHQK, s_BHQK = s_BHQK, scores.map.values(s_BHQK)
    if scores.slope_BHQK is not None:
        s_BHQK = s_BHQK.masked_fill(scores.slope_BHQK == 0, 0.0)
    if scores.bias_BHQK is not None:
        s_BHQK = s_BHQK.add_(scores.bias_BHQK)
    if scores.causal:
        later = torch.ones(Q, K, dtype=torch.bool, device=s_BHQK.device).triu_(1)
        s_BHQK = s_BHQK.masked_fill_(later, -math.inf)
    return s_BHQK, tanh_BHQK, given_BHQK


def _math_forward(
    q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    s_BHQK, *_ = _math_scores(q_BHQD, k_BGKD, scores)
    # Relative to the row's maximum, not to its logsumexp: a large logsumexp has lost digits.
    top_BHQ = finite(s_BHQK.amax(-1))
    p_BHQK = s_BHQK.sub_(top_BHQ[..., None]).exp_()
    sum_BHQ = p_BHQK.sum(-1)
    if scores.kept_BHQK is not None:
        p_BHQK = drop_(p_BHQK, scores.kept_BHQK)
    p_BGRK = _grouped(p_BHQK, v_BGKE.shape[1])
    out_BHQE = (p_BGRK @ v_BGKE.to(p_BGRK.dtype)).view(*q_BHQD.shape[:3], v_BGKE.shape[-1])
    empty_BHQ = sum_BHQ == 0
    divisor_BHQ = sum_BHQ.masked_fill(empty_BHQ, 1.0)
    if scores.kept_BHQK is not None:
        divisor_BHQ = divisor_BHQ.mul_(scores.share_kept)
    out_BHQE = out_BHQE.div_(divisor_BHQ[..., None])
    if scores.bias_BHQK is not None:
        top_BHQ = stepped(top_BHQ)
    return out_BHQE, top_BHQ + sum_BHQ.log()


def _math_backward(
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, _ = math_backward(
        dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ, scores, wants_bias=False
    )
    return dq, dk, dv


def math_backward(
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
    scores: Scores,
    *,
    wants_bias: bool,
    weights_BHQ: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of one tile; with ``wants_bias`` that of the bias too, as [B, H, Q, K].

    ``weights_BHQ`` stands for the weight of every key of a row, whatever the scores say.
    """
    G = k_BGKD.shape[1]
    s_BHQK, tanh_BHQK, given_BHQK = _math_scores(q_BHQD, k_BGKD, scores)
    kept_in = s_BHQK.dtype
    if weights_BHQ is None:
        p_BHQK = _weights(s_BHQK, finite(lse_BHQ))
    else:
        p_BHQK = weights_BHQ.to(kept_in)[..., None].expand_as(s_BHQK).contiguous()
    dout_BGRE = _grouped(dout_BHQE.to(kept_in), G)
    delta_BHQ = (dout_BHQE.to(kept_in) * out_BHQE.to(kept_in)).sum(-1)
    if scores.kept_BHQK is not None:
        dout_BGRE = dout_BGRE / scores.share_kept
    dp_BHQK = (dout_BGRE @ v_BGKE.to(kept_in).transpose(-1, -2)).view_as(p_BHQK)
    if scores.kept_BHQK is not None:
        dp_BHQK = drop_(dp_BHQK, scores.kept_BHQK)
    ds_BHQK = dp_BHQK.sub_(delta_BHQ[..., None]).mul_(p_BHQK)
    if scores.kept_BHQK is not None:
        p_BHQK = drop_(p_BHQK, scores.kept_BHQK)
    dv_BGKE = _grouped(p_BHQK, G).transpose(-1, -2) @ dout_BGRE
    dbias_BHQK = ds_BHQK.clone() if wants_bias else None
    if scores.slope_BHQK is not None:
        ds_BHQK = ds_BHQK.mul_(scores.slope_BHQK)
    if scores.map is not None and given_BHQK is not None:
        ds_BHQK = scores.map.pulled(ds_BHQK, given_BHQK)
    if tanh_BHQK is not None:
        ds_BHQK = ds_BHQK.mul_(1 - tanh_BHQK.square())
    ds_BGRK = _grouped(ds_BHQK.mul_(scores.scale), G)
    dq_BHQD = (ds_BGRK @ k_BGKD.to(kept_in)).view_as(q_BHQD)
    dk_BGKD = ds_BGRK.transpose(-1, -2) @ _grouped(q_BHQD.to(kept_in), G)
    return dq_BHQD, dk_BGKD, dv_BGKE, dbias_BHQK


def _weights(s_BHQK: Tensor, lse_BHQ: Tensor) -> Tensor:
    """exp(s - lse), in the dtype of s."""
    if is_deep(lse_BHQ, s_BHQK.dtype):
        return (stepped(s_BHQK) - lse_BHQ[..., None]).exp_().to(s_BHQK.dtype)
    return s_BHQK.sub_(lse_BHQ.to(s_BHQK.dtype)[..., None]).exp_()


def finite(lse_BHQ: Tensor) -> Tensor:
    """exp(-inf - lse) must be 0, also where the row kept nothing and lse is -inf itself."""
    return lse_BHQ.masked_fill(lse_BHQ == -math.inf, 0.0)


MATH = Kernel(name="math", forward=_math_forward, backward=_math_backward, stores_scores=True)


# --- torch's flash kernel for CPU -----------------------------------------------------------------


FEWEST_KEYS = 16
"""torch 2.13's kernel takes a row of NaN scores for a masked one, and gives 0, where keys are fewer
than a vector register holds."""


def same_head_dims(
    q_BHQD: Tensor, k_BGKD: Tensor, *values: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The kernel wants D == E: zeros appended to the shorter change neither scores nor output."""
    D, E = q_BHQD.shape[-1], values[0].shape[-1]
    if D < E:
        q_BHQD, k_BGKD = F.pad(q_BHQD, (0, E - D)), F.pad(k_BGKD, (0, E - D))
    elif E < D:
        values = tuple(F.pad(value, (0, D - E)) for value in values)
    return q_BHQD, k_BGKD, values


def computed_in(dtype: torch.dtype, device: str, *, backward: bool) -> torch.dtype:
    """What a fused kernel computes in: on a CPU half precision is computed in float32.

    But bfloat16 on a CPU with matrix units for it, and backward with instructions for it. Elsewhere
    the forward is no faster in bfloat16 (4 heads, 2048 tokens, one core with AVX512-BF16: 50 ms,
    float32 49 ms; 76 ms in float16), and a tile's result is not rounded before it is merged. The
    backward takes 76 ms in bfloat16 with AVX512-BF16, 123 ms in float32, 1,216 ms in float16.
    """
    if device != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    is_fast = _multiplies_bfloat16() if backward else _has_matrix_units()
    return dtype if dtype == torch.bfloat16 and is_fast else torch.float32


def _forward_type(x: Tensor) -> Tensor:
    return x.to(computed_in(x.dtype, "cpu", backward=False))


def _backward_type(x: Tensor) -> Tensor:
    return x.to(computed_in(x.dtype, "cpu", backward=True))


@functools.cache
def _has_matrix_units() -> bool:
    return _runs_avx512() and multiplies_matrices()


@functools.cache
def _multiplies_bfloat16() -> bool:
    found = _has_matrix_units() or multiplies_bfloat16_avx512()
    return found and _runs_avx512()


def _runs_avx512() -> bool:
    """Whether torch's kernels use what the processor has: ATEN_CPU_CAPABILITY may forbid it.

    There torch's own fused kernel fails in bfloat16 on a processor with matrix units ("pack_vnni2
    is only supported when avx512 is supported"): it asks the processor and not the setting.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _cpu_forward(
    q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    if k_BGKD.shape[2] < FEWEST_KEYS:
        return _math_forward(q_BHQD, k_BGKD, v_BGKE, scores)
    E = v_BGKE.shape[-1]
    q_BHQD, k_BGKD, v_BGKE = (_forward_type(x) for x in (q_BHQD, k_BGKD, v_BGKE))
    q_BHQD, k_BGKD, (v_BGKE,) = same_head_dims(q_BHQD, k_BGKD, v_BGKE)
    out_BHQE, lse_BHQ = aten._scaled_dot_product_flash_attention_for_cpu(
        _rows(q_BHQD),
        _rows(k_BGKD),
        _rows(v_BGKE),
        0.0,
        scores.causal,
        attn_mask=_whole_mask(scores.bias_BHQK, q_BHQD, k_BGKD),
        scale=scores.scale,
    )
    if scores.bias_BHQK is not None:
        # The kernel says lse = 0 where a row has no key; to a merge that would be a weight of 1.
        empty_BHQ = (scores.bias_BHQK == -math.inf).all(-1)
        lse_BHQ = lse_BHQ.masked_fill(empty_BHQ, -math.inf)
    return out_BHQE[..., :E], lse_BHQ


def _cpu_backward(
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    D, E = q_BHQD.shape[-1], v_BGKE.shape[-1]
    dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE = (
        _backward_type(x) for x in (dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE)
    )
    q_BHQD, k_BGKD, (v_BGKE, dout_BHQE, out_BHQE) = same_head_dims(
        q_BHQD, k_BGKD, v_BGKE, dout_BHQE, out_BHQE
    )
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _rows(dout_BHQE),
        _rows(q_BHQD),
        _rows(k_BGKD),
        _rows(v_BGKE),
        _rows(out_BHQE),
        finite(lse_BHQ),
        0.0,
        scores.causal,
        attn_mask=_whole_mask(scores.bias_BHQK, q_BHQD, k_BGKD),
        scale=scores.scale,
    )
    return dq[..., :D], dk[..., :D], dv[..., :E]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole_mask(bias_BHQK: Tensor | None, q_BHQD: Tensor, k_BGKD: Tensor) -> Tensor | None:
    """The kernel takes a mask with both token dims written out; batch and heads may broadcast."""
    if bias_BHQK is None:
        return None
    return bias_BHQK.expand(*bias_BHQK.shape[:2], q_BHQD.shape[2], k_BGKD.shape[2]).contiguous()


CPU_FLASH = Kernel(
    name="cpu_flash", forward=_cpu_forward, backward=_cpu_backward, stores_scores=False
)
