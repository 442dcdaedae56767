"""What models import from xformers.ops."""

from xformers.ops import fmha
from xformers.ops.fmha import memory_efficient_attention, memory_efficient_attention_forward
from xformers.ops.fmha.attn_bias import AttentionBias, LowerTriangularMask

__all__ = [
    "AttentionBias",
    "LowerTriangularMask",
    "fmha",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
]
