"""torch's fused kernels on CUDA: flash for half precision, efficient for masks and float32.

Both return the natural logarithm of the softmax's sum. Flash takes no mask, so pieces that need one
go to the efficient kernel. Key/value heads are written out to the number of query heads, which both
take in every release, and their gradients added.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D and E head dims.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ringfx.ops.kernels import MATH, Kernel, Scores, finite, same_head_dims

__all__ = ["choose"]

aten = torch.ops.aten
Tensor = torch.Tensor

HEAD_DIM_MULTIPLE = 8
"""Both kernels read 16 bytes at once: head dims are padded with zeros to 8 halves."""
LARGEST_FLASH_HEAD_DIM = 256
LSE_MULTIPLE = 32
"""The efficient kernel pads the logsumexp's queries to this."""
BIAS_MULTIPLE = 16


def choose(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Flash for float16 and bfloat16, efficient for float32, math for float64."""
    if dtype in (torch.float16, torch.bfloat16):
        return FLASH
    return EFFICIENT if dtype == torch.float32 else MATH


def _expand(x_BGKD: Tensor, heads: int) -> Tensor:
    G = x_BGKD.shape[1]
    return x_BGKD if heads == G else x_BGKD.repeat_interleave(heads // G, dim=1)


def _collapse(x_BHKD: Tensor, groups: int) -> Tensor:
    B, H, K, D = x_BHKD.shape
    return x_BHKD if groups == H else x_BHKD.view(B, groups, H // groups, K, D).sum(2)


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    def pad(x: Tensor) -> Tensor:
        missing = -x.shape[-1] % HEAD_DIM_MULTIPLE
        return F.pad(x, (0, missing)) if missing else x

    return tuple(pad(x) for x in tensors)


def _fits_flash(q_BHQD: Tensor, scores: Scores) -> bool:
    return scores.bias_BHQK is None and q_BHQD.shape[-1] <= LARGEST_FLASH_HEAD_DIM


def _flash_forward(
    q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    if not _fits_flash(q_BHQD, scores):
        return _efficient_forward(q_BHQD, k_BGKD, v_BGKE, scores)
    H, E = q_BHQD.shape[1], v_BGKE.shape[-1]
    q, k, (v,) = same_head_dims(q_BHQD, _expand(k_BGKD, H), _expand(v_BGKE, H))
    q, k, v = _padded(q, k, v)
    found = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, scores.causal, False, scale=scores.scale
    )
    return found[0][..., :E], found[1]


def _flash_backward(
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits_flash(q_BHQD, scores):
        return _efficient_backward(dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ, scores)
    H, G = q_BHQD.shape[1], k_BGKD.shape[1]
    D, E = q_BHQD.shape[-1], v_BGKE.shape[-1]
    q, k, (v, dout, out) = same_head_dims(
        q_BHQD, _expand(k_BGKD, H), _expand(v_BGKE, H), dout_BHQE, out_BHQE
    )
    q, k, v, dout, out = _padded(q, k, v, dout, out)
    none = torch.empty(0, dtype=torch.int64, device=q.device)
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        finite(lse_BHQ).contiguous(),
        none,
        none,
        q.shape[2],
        k.shape[2],
        0.0,
        scores.causal,
        random,
        none,
        scale=scores.scale,
    )
    return dq[..., :D], _collapse(dk, G)[..., :D], _collapse(dv, G)[..., :E]


def _aligned_bias(scores: Scores, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias in q's dtype with rows that start at multiples of 16 entries."""
    if scores.bias_BHQK is None:
        return None
    bias = scores.bias_BHQK.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    missing = -k.shape[2] % BIAS_MULTIPLE
    return F.pad(bias, (0, missing))[..., : k.shape[2]] if missing else bias.contiguous()


def _efficient_forward(
    q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    H, Q, E = q_BHQD.shape[1], q_BHQD.shape[2], v_BGKE.shape[-1]
    q, k, v = _padded(q_BHQD, _expand(k_BGKD, H), _expand(v_BGKE, H))
    bias = _aligned_bias(scores, q, k)
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, scores.causal, scale=scores.scale
    )
    lse = lse[..., :Q]
    if scores.bias_BHQK is not None:
        empty = (scores.bias_BHQK == -math.inf).all(-1)
        lse = lse.masked_fill(empty, -math.inf)
        out = out.masked_fill(empty[..., None], 0.0)
    return out[..., :E], lse


def _efficient_backward(
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    H, Q, G = q_BHQD.shape[1], q_BHQD.shape[2], k_BGKD.shape[1]
    D, E = q_BHQD.shape[-1], v_BGKE.shape[-1]
    q, k, v, dout, out = _padded(
        q_BHQD, _expand(k_BGKD, H), _expand(v_BGKE, H), dout_BHQE, out_BHQE
    )
    lse = F.pad(finite(lse_BHQ), (0, -Q % LSE_MULTIPLE))
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout,
        q,
        k,
        v,
        _aligned_bias(scores, q, k),
        out,
        lse,
        zero,
        zero,
        0.0,
        [True, True, True, False],
        scores.causal,
        scale=scores.scale,
    )
    return dq[..., :D], _collapse(dk, G)[..., :D], _collapse(dv, G)[..., :E]


FLASH = Kernel(
    name="cuda_flash", forward=_flash_forward, backward=_flash_backward, stores_scores=False
)
EFFICIENT = Kernel(
    name="cuda_efficient",
    forward=_efficient_forward,
    backward=_efficient_backward,
    stores_scores=False,
)
