"""memory_efficient_attention by definition; a bias object is made into its matrix."""

import torch
from dense_definition import CALLS, Opaque, dense

from xformers.ops.fmha import attn_bias
from xformers.ops.fmha.attn_bias import AttentionBias, BlockDiagonalMask, LowerTriangularMask

__all__ = ["BlockDiagonalMask", "LowerTriangularMask", "attn_bias", "memory_efficient_attention"]


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    def run(query, key, value):
        CALLS.append("memory_efficient_attention")
        matrix = attn_bias
        if isinstance(attn_bias, AttentionBias):
            matrix = attn_bias.materialize((query.shape[1], key.shape[1])).to(query.dtype)
        q, k, v = (x.unsqueeze(2) if x.dim() == 3 else x for x in (query, key, value))
        heads = q.shape[2:-1].numel()
        outs = []
        for b in range(q.shape[0]):
            rows = [x[b].reshape(x.shape[1], heads, -1) for x in (q, k, v)]
            own = None
            if matrix is not None:
                own = matrix if matrix.dim() == 2 else matrix[b]
                own = own if own.dim() == 2 else own.reshape(-1, *own.shape[-2:])
            outs.append(dense(*rows, scale=scale, bias=own, dropout=p)[0])
        out = torch.stack(outs).reshape(*query.shape[:-1], value.shape[-1])
        return out if output_dtype is None else out.to(output_dtype)

    return Opaque.apply(run, query, key, value)


def memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    return memory_efficient_attention(
        query, key, value, attn_bias, p, scale, output_dtype=output_dtype
    )
