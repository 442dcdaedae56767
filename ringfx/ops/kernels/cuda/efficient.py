"""torch's memory-efficient kernel: any mask, float32 too; and what the maskless kernels fall to.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D and E head dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ringfx.ir.kernel_table import TABLE
from ringfx.ops.kernels.cuda.shapes import collapse_heads, expand_heads, pad_head_dims
from ringfx.ops.kernels.kernel import Kernel, Scores, finite, same_head_dims

__all__ = ["EFFICIENT", "Maskless"]

aten = torch.ops.aten
Tensor = torch.Tensor

LSE_MULTIPLE = 32
"""The kernel pads the logsumexp's queries to this."""
BIAS_MULTIPLE = 16


def _aligned_bias(scores: Scores, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias in q's dtype with rows that start at multiples of 16 entries."""
    if scores.bias_BHQK is None:
        return None
    bias = scores.bias_BHQK.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    missing = -k.shape[2] % BIAS_MULTIPLE
    return F.pad(bias, (0, missing))[..., : k.shape[2]] if missing else bias.contiguous()


def _forward(
    q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    H, Q, E = q_BHQD.shape[1], q_BHQD.shape[2], v_BGKE.shape[-1]
    q, k, v = pad_head_dims(q_BHQD, expand_heads(k_BGKD, H), expand_heads(v_BGKE, H))
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


def _backward(
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
    q, k, v, dout, out = pad_head_dims(
        q_BHQD, expand_heads(k_BGKD, H), expand_heads(v_BGKE, H), dout_BHQE, out_BHQE
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
    return dq[..., :D], collapse_heads(dk, G)[..., :D], collapse_heads(dv, G)[..., :E]


EFFICIENT = Kernel(name="cuda_efficient", forward=_forward, backward=_backward, stores_scores=False)


@dataclass(frozen=True, kw_only=True)
class Maskless:
    """A kernel that knows no mask but the causal one, and takes as many K/V heads as query heads.

    ``attend(q, k, v, causal, scale)`` gives (out, lse) and ``differentiate(dout, q, k, v, out, lse,
    causal, scale)`` (dq, dk, dv), all [B, H, tokens, head dim] of one head dim, lse [B, H, Q].
    What the table of kernels says that it does not take goes to the efficient kernel.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    differentiate: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float],
        tuple[Tensor, Tensor, Tensor],
    ]

    def kernel(self) -> Kernel:
        return Kernel(
            name=self.name, forward=self.forward, backward=self.backward, stores_scores=False
        )

    def _fits(self, q_BHQD: Tensor, v_BGKE: Tensor, scores: Scores) -> bool:
        limits, head_dim = TABLE[self.name], max(q_BHQD.shape[-1], v_BGKE.shape[-1])
        return (
            scores.bias_BHQK is None
            and v_BGKE.shape[2] >= limits.fewest_keys
            and (limits.largest_head_dim is None or head_dim <= limits.largest_head_dim)
        )

    def forward(
        self, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        if not self._fits(q_BHQD, v_BGKE, scores):
            return _forward(q_BHQD, k_BGKD, v_BGKE, scores)
        H, E = q_BHQD.shape[1], v_BGKE.shape[-1]
        q, k, (v,) = same_head_dims(q_BHQD, expand_heads(k_BGKD, H), expand_heads(v_BGKE, H))
        q, k, v = pad_head_dims(q, k, v)
        out, lse_BHQ = self.attend(q, k, v, scores.causal, scores.scale)
        return out[..., :E], lse_BHQ

    def backward(
        self,
        dout_BHQE: Tensor,
        q_BHQD: Tensor,
        k_BGKD: Tensor,
        v_BGKE: Tensor,
        out_BHQE: Tensor,
        lse_BHQ: Tensor,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._fits(q_BHQD, v_BGKE, scores):
            return _backward(dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ, scores)
        H, G = q_BHQD.shape[1], k_BGKD.shape[1]
        D, E = q_BHQD.shape[-1], v_BGKE.shape[-1]
        q, k, (v, dout, out) = same_head_dims(
            q_BHQD, expand_heads(k_BGKD, H), expand_heads(v_BGKE, H), dout_BHQE, out_BHQE
        )
        q, k, v, dout, out = pad_head_dims(q, k, v, dout, out)
        lse = finite(lse_BHQ).contiguous()
        dq, dk, dv = self.differentiate(dout, q, k, v, out, lse, scores.causal, scores.scale)
        return dq[..., :D], collapse_heads(dk, G)[..., :D], collapse_heads(dv, G)[..., :E]
