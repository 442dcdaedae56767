"""flex_attention's own parts: loading this module loads Dynamo.

Without any of these: flex attention. The names below are torch's.
"""

from __future__ import annotations

import torch
from torch._dynamo import _trace_wrapped_higher_order_op as trace_wrapped
from torch.nn.attention import flex_attention

__all__ = ["LARGE_BLOCK_SIZE", "TransformGetItemToIndex", "mapped_over_positions", "safe_softmax"]

TransformGetItemToIndex = trace_wrapped.TransformGetItemToIndex
"""Lets mask functions index captured tensors by positions."""

LARGE_BLOCK_SIZE = flex_attention._LARGE_SPARSE_BLOCK_SIZE
"""The block size of a mask that keeps everything: such a call has no block mask."""

mapped_over_positions = flex_attention._vmap_for_bhqkv
"""A mask or score function over all of batch, heads, queries and keys."""

safe_softmax = torch._safe_softmax
"""A softmax that gives 0 for rows without a key."""
