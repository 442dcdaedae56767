"""Dilated attention: each branch is attention of some heads over the rows that they keep.

A branch and the heads of one offset make a *part*: its rows are numbered in order, and over those
numbers it is the attention of every other layer, with a block-diagonal mask. So whatever computes
attention over ranks computes the parts, one after the other. The branches are merged like partial
results over disjoint keys,

    o = sum_i w_i o_i,   w_i = exp(l_i - l),   l = logsumexp_i l_i

and as a key that several branches keep counts once in each, the gradients are those of one softmax
over the keys of all branches: a part's backward is given the merged o and l.

Shapes: B batch, H query heads, G key/value heads, Q local tokens, N kept rows, D and E head dims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ringfx.cost_model.prediction.strategy import Backward, Forward
from ringfx.ir.dilation import HeadPart, KeptLayout, StridedRun, head_parts
from ringfx.ops.kernels.kernel import accumulation_dtype
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients, merge_into
from ringfx.ops.tiling.pieces import tiling_of

__all__ = ["backward", "forward"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """One branch, for the heads that start at one offset."""

    problem: Problem
    heads: slice
    kv_heads: tuple[int, ...]
    """Of each group of these heads, the K/V head that they read; one may serve several groups."""
    runs: tuple[StridedRun, ...]
    """Where the kept rows lie among this rank's tokens."""
    local_length: int

    def rows(self, x_BHQD: Tensor) -> Tensor:
        """The kept rows of these heads, [B, H, N] and what follows; padding at the end is 0."""
        return self._packed(x_BHQD[:, self.heads])

    def kv_rows(self, x_BGKD: Tensor) -> Tensor:
        return self._packed(x_BGKD[:, _steps(self.kv_heads)])

    def keeps_all_of(self, x_BHQD: Tensor) -> bool:
        """Whether its rows are all rows of all heads, in their order."""
        whole = StridedRun(local=slice(0, x_BHQD.shape[2], 1), place=0, count=x_BHQD.shape[2])
        return self.runs == (whole,) and self.heads.step == 1 and self.heads.stop == x_BHQD.shape[1]

    def _packed(self, x: Tensor) -> Tensor:
        if len(self.runs) == 1 and self.runs[0].count == self.local_length:
            return x[:, :, self.runs[0].local]
        found = x.new_zeros(*x.shape[:2], self.local_length, *x.shape[3:])
        for run in self.runs:
            found[:, :, run.place : run.place + run.count] = x[:, :, run.local]
        return found

    def merge(self, out_BHQE: Tensor, lse_BHQ: Tensor, found: tuple[Tensor, Tensor]) -> None:
        """Adds the part's result to the rows of all branches before."""
        for run in self.runs:
            here = slice(run.place, run.place + run.count)
            merge_into(
                out_BHQE[:, self.heads, run.local], lse_BHQ[:, self.heads, run.local],
                found[0][:, :, here], found[1][:, :, here].to(lse_BHQ.dtype),
            )  # fmt: skip

    def add_rows(self, total_BHQD: Tensor, found_BHND: Tensor) -> None:
        self._add(total_BHQD[:, self.heads], found_BHND)

    def add_kv_rows(self, total_BGKD: Tensor, found_BGND: Tensor) -> None:
        """A K/V head that serves several groups takes the sum of theirs."""
        heads = _steps(self.kv_heads)
        if isinstance(heads, slice):
            self._add(total_BGKD[:, heads], found_BGND)
            return
        for place, head in enumerate(heads):
            self._add(total_BGKD[:, head : head + 1], found_BGND[:, place : place + 1])

    def _add(self, total: Tensor, found: Tensor) -> None:
        for run in self.runs:
            total[:, :, run.local] += found[:, :, run.place : run.place + run.count]


def _steps(heads: tuple[int, ...]) -> slice | list[int]:
    """Heads at even distances as a slice, which takes a view."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    stop = heads[0] + step * len(heads)
    even = step > 0 and heads == tuple(range(heads[0], stop, step))
    return slice(heads[0], stop, step) if even else list(heads)


def _parts(problem: Problem, q_BHQD: Tensor, num_kv_heads: int) -> Iterator[_Part]:
    """The parts of this rank's heads."""
    spec = problem.spec
    given = (spec.branches, spec.q_len, q_BHQD.shape[1], num_kv_heads, problem.first_head)
    return (_part(problem, part, q_BHQD) for part in head_parts(*given))


def _part(problem: Problem, part: HeadPart, q_BHQD: Tensor) -> _Part:
    tiling = tiling_of(q_BHQD[:, : len(part.heads)], problem.kernel.stores_scores)
    spec = problem.spec.of_rows(part.rows)
    local = replace(problem, spec=spec, rows=part.rows, tiling=tiling)
    layout = local.q_layout
    assert isinstance(layout, KeptLayout), "rows are given"
    return _Part(
        problem=local,
        heads=slice(part.heads.start, part.heads.stop, part.heads.step),
        kv_heads=part.kv_heads,
        runs=tuple(layout.strided_runs(problem.ranks.rank)),
        local_length=layout.local_length,
    )


def forward(
    of_part: Forward, problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The merged output of the local queries and its logsumexp; 0 and -inf of rows not kept."""
    total: tuple[Tensor, Tensor] | None = None
    for part in _parts(problem, q_BHQD, k_BGKD.shape[1]):
        k, v = map(part.kv_rows, (k_BGKD, v_BGKE))
        found = of_part(part.problem, part.rows(q_BHQD), k, v)
        if total is None and part.keeps_all_of(q_BHQD):
            total = found  # what comes after is added to it
            continue
        total = total or _nothing(problem, q_BHQD, v_BGKE)
        part.merge(*total, found)
    return total or _nothing(problem, q_BHQD, v_BGKE)


def _nothing(problem: Problem, q_BHQD: Tensor, v_BGKE: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows that no branch keeps."""
    B, H, Q, _ = q_BHQD.shape
    kept_in, lse_in = accumulation_dtype(q_BHQD.dtype), problem.logsumexp_dtype(q_BHQD.dtype)
    out_BHQE = q_BHQD.new_zeros(B, H, Q, v_BGKE.shape[3], dtype=kept_in)
    return out_BHQE, q_BHQD.new_full((B, H, Q), -math.inf, dtype=lse_in)


def backward(
    of_part: Backward,
    problem: Problem,
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
) -> Gradients:
    """The gradients of the local queries, keys and values."""
    total: Gradients | None = None
    for part in _parts(problem, q_BHQD, k_BGKD.shape[1]):
        dout, q, out, lse = map(part.rows, (dout_BHQE, q_BHQD, out_BHQE, lse_BHQ))
        k, v = map(part.kv_rows, (k_BGKD, v_BGKE))
        found = of_part(part.problem, dout, q, k, v, out, lse)
        if total is None and part.keeps_all_of(q_BHQD):
            total = found
            continue
        total = total or _no_gradients(q_BHQD, k_BGKD, v_BGKE)
        part.add_rows(total.dq_BHQD, found.dq_BHQD)
        part.add_kv_rows(total.dk_BGKD, found.dk_BGKD)
        part.add_kv_rows(total.dv_BGKE, found.dv_BGKE)
    return total or _no_gradients(q_BHQD, k_BGKD, v_BGKE)


def _no_gradients(q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor) -> Gradients:
    return Gradients(_zeros(q_BHQD), _zeros(k_BGKD), _zeros(v_BGKE), [])


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(
        like, dtype=accumulation_dtype(like.dtype), memory_format=torch.contiguous_format
    )
