"""Single tokens of a split value: each comes from the rank that has it.

Every rank reads the same numbers, takes what it has and puts nothing elsewhere; the sum over ranks
is the result. Its transpose puts each gradient back where the token came from.
"""

from __future__ import annotations

import torch

__all__ = ["additive_zero", "join_pieces", "local_rows", "mask_rows", "take_range"]


def local_rows(
    index: torch.Tensor, own: torch.Tensor, length: int, outer: int, inner: int
) -> torch.Tensor:
    """Where elements of a dimension [outer, length, inner] lie on this rank; -1 where they do not.

    Parameters
    ----------
    index
        int64, any shape: elements by number, negative ones from the end.
    own
        int64 [local tokens]: which token of the axis each local token is; outside 0 .. length - 1
        it is padding.
    """
    local = own.shape[0]
    here = (own >= 0) & (own < length)
    slots = torch.full((length + 1,), -1, dtype=torch.int64, device=own.device)
    slots = slots.scatter(0, torch.where(here, own, length), torch.arange(local, device=own.device))
    index = index.to(torch.int64).remainder(outer * length * inner)
    slot = slots[:length][index // inner % length]
    row = (index // (length * inner) * local + slot) * inner + index % inner
    return torch.where(slot >= 0, row, -1)


def additive_zero(x: torch.Tensor) -> torch.Tensor:
    """The neutral element of addition in x's type: -0.0, since -0.0 + 0.0 is 0.0."""
    zero = complex(-0.0, -0.0) if x.is_complex() else -0.0 if x.is_floating_point() else 0
    return torch.full((), zero, dtype=x.dtype, device=x.device)


def mask_rows(x: torch.Tensor, rows: torch.Tensor, trailing: int) -> torch.Tensor:
    """x where rows are this rank's, nothing elsewhere; ``trailing`` dimensions follow theirs."""
    here = (rows >= 0).reshape(*rows.shape, *(1,) * trailing)
    return torch.where(here, x, additive_zero(x))


def take_range(
    x: torch.Tensor, own: torch.Tensor, start: int, count: int, length: int, dim: int
) -> torch.Tensor:
    """Tokens from ``start`` of dimension ``dim``, ``count``; nothing where others have them."""
    index = torch.arange(start, start + count, device=own.device)
    rows = local_rows(index, own, length, 1, 1)
    return mask_rows(x.index_select(dim, rows.clamp_min(0)), rows, x.dim() - dim - 1)


def join_pieces(
    pieces: list[torch.Tensor],
    starts: list[int],
    is_local: list[bool],
    own: torch.Tensor,
    dim: int,
) -> torch.Tensor:
    """This rank's tokens of a concatenation along ``dim``.

    Parameters
    ----------
    pieces
        Each either whole, or already this rank's tokens of the whole length.
    starts
        The element of the result at which each piece starts.
    own
        int64 [local tokens]: which element of the result each local token is.
    """
    joined: torch.Tensor | None = None
    for piece, start, local in zip(pieces, starts, is_local, strict=True):
        if piece.dim() <= dim or piece.shape[dim] == 0:
            continue
        if not local:
            wanted = (own - start).clamp(0, piece.shape[dim] - 1)
            piece = piece.index_select(dim, wanted)
        if joined is not None:
            from_here = (own >= start).view(-1, *(1,) * (piece.dim() - dim - 1))
            piece = torch.where(from_here, piece, joined)
        joined = piece
    assert joined is not None, "a concatenation of nothing"
    return joined
