"""The family of attention biases: the classes' names and fields, each as a matrix of 0 and -inf."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dense_definition import band


def _additive(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)


class AttentionBias:
    def materialize(self, shape):
        raise NotImplementedError


class LowerTriangularMask(AttentionBias):
    def __init__(self, device=None):
        pass

    def materialize(self, shape):
        return _additive(band(*shape, -1, 0, 0))

    def add_bias(self, bias):
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias):
        self._bias = bias

    def materialize(self, shape):
        return super().materialize(shape) + self._bias


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int

    def materialize(self, shape):
        return _additive(band(*shape, self.window_left, self.window_right, shape[1] - shape[0]))


class LowerTriangularFromBottomRightMask(AttentionBias):
    def materialize(self, shape):
        return _additive(band(*shape, -1, 0, shape[1] - shape[0]))

    def make_local_attention(self, window_size):
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int

    def materialize(self, shape):
        return _additive(band(*shape, self._window_size - 1, 0, shape[1] - shape[0]))


@dataclass
class _SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens):
        starts = [0]
        for length in seqlens:
            starts.append(starts[-1] + length)
        tensor = torch.tensor(starts, dtype=torch.int32)
        return cls(tensor, max(seqlens), min(seqlens), starts)

    def intervals(self):
        yield from zip(self.seqstart_py, self.seqstart_py[1:], strict=False)


@dataclass
class BlockDiagonalMask(AttentionBias):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        q_info = _SeqLenInfo.from_seqlens(q_seqlen)
        k_info = q_info if kv_seqlen is None else _SeqLenInfo.from_seqlens(kv_seqlen)
        return cls(q_seqinfo=q_info, k_seqinfo=k_info)

    def _block(self, m, n):
        return band(m, n, -1, -1, 0)

    def materialize(self, shape):
        allowed = torch.zeros(shape, dtype=torch.bool)
        pairs = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for (q0, q1), (k0, k1) in pairs:
            allowed[q0:q1, k0:k1] = self._block(q1 - q0, k1 - k0)
        return _additive(allowed)

    def _as(self, kind, **fields: Any):
        return kind(q_seqinfo=self.q_seqinfo, k_seqinfo=self.k_seqinfo, **fields)

    def make_causal(self):
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self):
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size):
        return self._as(BlockDiagonalCausalLocalAttentionMask, _window_size=window_size)

    def make_local_attention_from_bottomright(self, window_size):
        kind = BlockDiagonalCausalLocalAttentionFromBottomRightMask
        return self._as(kind, _window_size=window_size)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    def _block(self, m, n):
        return band(m, n, -1, 0, 0)


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def _block(self, m, n):
        return band(m, n, -1, 0, n - m)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0

    def _block(self, m, n):
        return band(m, n, self._window_size - 1, 0, 0)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0

    def _block(self, m, n):
        return band(m, n, self._window_size - 1, 0, n - m)


class BlockDiagonalPaddedKeysMask(AttentionBias):
    """A bias that ringfx has no spelling for."""

    def materialize(self, shape):
        return torch.zeros(shape)
