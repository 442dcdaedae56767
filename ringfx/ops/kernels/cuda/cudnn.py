"""cuDNN's fused attention through torch's operators.

Which of it and flash is faster depends on the card and on cuDNN's version, so a calibration says;
where nothing was measured it is taken on the cards on which torch prefers it. Its logsumexp has one
more dim of size 1.
"""

from __future__ import annotations

import torch

from ringfx.ops.kernels.cuda.efficient import Maskless

__all__ = ["CUDNN", "missing"]

aten = torch.ops.aten
Tensor = torch.Tensor

LEAST_VERSION = 91501
"""Before 9.15.1 lengths that 128 does not divide come out wrong (pytorch issue 169849)."""


def missing() -> str:
    """What this machine lacks for it, in words."""
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or torch.version.hip is not None:
        return "this torch has no cuDNN"
    if version < LEAST_VERSION:
        return f"cuDNN is {version}, and before {LEAST_VERSION} it is wrong at some lengths"
    return ""


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
    attend=_attend,
    differentiate=_differentiate,
).kernel()
