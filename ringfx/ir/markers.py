"""Marks that steps leave on a program for later ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["OFFLOADED", "SENT_AGAIN", "every_token"]

SENT_AGAIN = "ringfx_sent_again"
"""In the meta of an attention: it is run again in backward, and its messages are sent again."""

OFFLOADED = "ringfx_offloaded"
"""In the meta of a value: where backward reads it, it is kept in the host's memory until then."""


def every_token(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """x itself. In the program its tokens in ``dims`` are all there, and an axis of their own.

    See ``passes/normalize/rows_and_columns.py``.
    """
    return x
