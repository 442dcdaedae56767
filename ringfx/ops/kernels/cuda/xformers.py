"""xformers' memory-efficient attention, where that package is installed.

It has tokens before heads, and its logsumexp may be longer than the queries.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from ringfx.ops.kernels.cuda.efficient import Maskless

__all__ = ["XFORMERS", "missing"]

Tensor = torch.Tensor


@functools.cache
def missing() -> str:
    """What this machine lacks for it, in words."""
    found = importlib.util.find_spec("xformers") is not None
    return "" if found else "the package xformers is not installed"


def _operators() -> Any:
    return importlib.import_module("xformers.ops")


def _mask(causal: bool) -> Any:
    return _operators().LowerTriangularMask() if causal else None


def _tokens_first(x_BHKD: Tensor) -> Tensor:
    return x_BHKD.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out_BQHD, lse_BHQ = _operators().memory_efficient_attention_forward_requires_grad(
        *(_tokens_first(x) for x in (q, k, v)), attn_bias=_mask(causal), p=0.0, scale=scale
    )
    return out_BQHD.transpose(1, 2), lse_BHQ[..., : q.shape[2]]


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
    found = _operators().memory_efficient_attention_backward(
        _tokens_first(dout),
        _tokens_first(out),
        lse_BHQ,
        *(_tokens_first(x) for x in (q, k, v)),
        attn_bias=_mask(causal),
        p=0.0,
        scale=scale,
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in found)
    return dq, dk, dv


XFORMERS = Maskless(
    name="cuda_xformers",
    attend=_attend,
    differentiate=_differentiate,
).kernel()
