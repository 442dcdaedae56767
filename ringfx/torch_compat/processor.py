"""What the processor computes with; each decides about a kernel's type. Without: wrong times."""

from __future__ import annotations

import torch

__all__ = ["multiplies_bfloat16_avx512", "multiplies_matrices"]


def multiplies_matrices() -> bool:
    """Whether it has matrix units (AMX), with which torch's flash kernel computes bfloat16."""
    return bool(torch.cpu._is_amx_tile_supported())


def multiplies_bfloat16_avx512() -> bool:
    """Whether it has products of bfloat16 (AVX512_BF16)."""
    return bool(torch.cpu._is_avx512_bf16_supported())
