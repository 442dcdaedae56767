"""What ranks that are forked share: torch with all that an attention loads when it first runs.

The first call of an operator loads Dynamo and sympy, 2.5 s, which every rank would pay by itself.
"""

from __future__ import annotations

import torch

from ringfx import ops
from tests.failures import faults

__all__ = ["faults"]

torch.set_num_threads(1)
q = torch.zeros(1, 2, 32, 16, requires_grad=True)
ops.ring_attention(q, q, q, strategy="simple", causal=True).sum().backward()  # starts no thread
