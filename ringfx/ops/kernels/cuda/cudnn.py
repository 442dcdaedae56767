"""cuDNN's fused attention through torch's operators.

It is taken where it is asked for (``RINGFX_CUDA_KERNEL=cuda_cudnn``), not by default: which of it
and flash is faster depends on the card and on cuDNN's version, so it is for a calibration to say.
Its logsumexp has one more dim of size 1.
"""

from __future__ import annotations

import torch

from ringfx.ops.kernels.cuda.efficient import Maskless

__all__ = ["CUDNN"]

aten = torch.ops.aten
Tensor = torch.Tensor

LARGEST_HEAD_DIM = 128


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return found[0], found[1].view(q.shape[:3])


def _differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_BHQ: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse_BHQ[..., None],
        zero,
        zero,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )
    return dq, dk, dv


CUDNN = Maskless(
    name="cuda_cudnn",
    largest_head_dim=LARGEST_HEAD_DIM,
    attend=_attend,
    differentiate=_differentiate,
).kernel()
