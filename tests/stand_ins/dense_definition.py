"""Attention by definition, one matrix of pairs at a time: what the stand-ins compute."""

import math

import torch

CALLS: list[str] = []
"""Names of the stand-ins that really ran, in order: a test empties it and looks."""


def dense(q, k, v, *, scale, allowed=None, bias=None, soft_cap=0.0, dropout=0.0):
    """q [M, H, D], k and v [N, G, D]; allowed [M, N]; bias broadcasts to [H, M, N]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("mhd,nhd->hmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    seen = scores.isfinite().any(-1, keepdim=True)
    weights = torch.softmax(torch.where(seen, scores, 0.0), -1) * seen
    weights = torch.nn.functional.dropout(weights, dropout)
    lse = torch.where(seen[..., 0], torch.logsumexp(torch.where(seen, scores, 0.0), -1), math.inf)
    return torch.einsum("hmn,nhe->mhe", weights, v), lse


def band(m, n, left, right, shift):
    """allowed[i, j]: i + shift - left <= j <= i + shift + right; a negative limit is none."""
    rows = []
    for i in range(m):
        low = -math.inf if left < 0 else i + shift - left
        high = math.inf if right < 0 else i + shift + right
        rows.append([low <= j <= high for j in range(n)])
    return torch.tensor(rows, dtype=torch.bool).reshape(m, n)


class Opaque(torch.autograd.Function):
    """Runs ``function(*tensors)`` outside the tracer's sight, its backward by recomputation."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return function(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
        with torch.enable_grad():
            results = ctx.function(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [t for t in tensors if t.requires_grad]
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
        outputs, seeds = [r for r, _ in pairs], [g for _, g in pairs]
        found = iter(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in tensors)
