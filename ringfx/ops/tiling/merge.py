"""Attention of local queries over some keys, piece by piece, merged in float32.

Two partial results over disjoint keys, (o1, l1) and (o2, l2) with l the logsumexp, merge into

    w = sigmoid(l2 - l1),   o = o1 + w (o2 - o1),   l = logaddexp(l1, l2)

which neither overflows nor loses a row: a row that has seen no key has l = -inf and weight 0.

Shapes: B batch, H query heads, G key/value heads, Q local queries, K local keys, D and E head dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ringfx.comm.stats import span
from ringfx.ir.tiles import TileIndex, evaluate
from ringfx.ops.kernels.kernel import MATH, Scores, accumulation_dtype, math_backward
from ringfx.ops.kernels.logsumexp import hides_rows, hides_rows_wholly, is_deep
from ringfx.ops.tiling import bias_gradients
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.drops import Drops
from ringfx.ops.tiling.flops import flops_per_pair
from ringfx.ops.tiling.head_groups import HeadGroup
from ringfx.ops.tiling.oom_retry import smaller, tried
from ringfx.ops.tiling.pieces import Piece, Run, Tiling, pieces
from ringfx.ops.tiling.score_maps import TileMap

__all__ = ["Gradients", "Output", "Sum", "Sums", "attend", "attend_backward", "merge_into"]

Tensor = torch.Tensor


def merge_into(old_out: Tensor, old_lse: Tensor, out_BHQE: Tensor, lse_BHQ: Tensor) -> None:
    """Adds to rows, in place, what they give over keys that they have not seen yet."""
    # Two weights, not one and its complement: an infinity must not become NaN.
    nothing_BHQ = lse_BHQ == -math.inf
    new_BHQ = torch.sigmoid(lse_BHQ - old_lse).masked_fill_(nothing_BHQ, 0.0)
    old_BHQ = torch.sigmoid(old_lse - lse_BHQ).masked_fill_(nothing_BHQ, 1.0)
    merged_lse = torch.logaddexp(old_lse, lse_BHQ)
    old_out.mul_(old_BHQ[..., None]).addcmul_(
        out_BHQE.to(old_out.dtype), new_BHQ[..., None].to(old_out.dtype)
    )
    old_lse.copy_(merged_lse)


class _Written:
    """Which local rows of an uninitialised tensor hold something; the others are made 0 late.

    Writing the first result instead of adding it to zeros saves two passes over memory.
    """

    def __init__(self, length: int) -> None:
        self._rows = bytearray(length)

    def is_fresh(self, a: int, b: int) -> bool:
        return self._rows.find(1, a, b) < 0

    def mark(self, a: int, b: int) -> None:
        self._rows[a:b] = b"\1" * (b - a)

    def fill(self, x_BHNE: Tensor, a: int, b: int) -> None:
        """Zeros where nothing was written."""
        start = self._rows.find(0, a, b)
        while start >= 0:
            stop = self._rows.find(1, start, b)
            stop = b if stop < 0 else stop
            x_BHNE[:, :, start:stop].zero_()
            start = self._rows.find(0, stop, b)


class Output:
    """The running output of all local queries and its logsumexp."""

    def __init__(self, out_BHQE: Tensor, lse_BHQ: Tensor) -> None:
        self.out_BHQE, self.lse_BHQ = out_BHQE, lse_BHQ
        self._written = _Written(lse_BHQ.shape[2])

    @staticmethod
    def empty(problem: Problem, q_BHQD: Tensor, v_head_dim: int) -> Output:
        """Of queries that have seen no key yet."""
        B, H, Q, _ = q_BHQD.shape
        kept_in = accumulation_dtype(q_BHQD.dtype)
        lse_in = problem.logsumexp_dtype(q_BHQD.dtype)
        return Output(
            q_BHQD.new_empty(B, H, Q, v_head_dim, dtype=kept_in),
            q_BHQD.new_full((B, H, Q), -math.inf, dtype=lse_in),
        )

    def of_heads(self, heads: slice) -> Output:
        """The part of some heads, with a record of its own of what is written."""
        return Output(self.out_BHQE[:, heads], self.lse_BHQ[:, heads])

    def merge(self, rows: Run, out_BHQE: Tensor, lse_BHQ: Tensor) -> None:
        """Adds what these rows give over keys that they have not seen yet."""
        a, b = rows.offset, rows.offset + rows.length
        old_out, old_lse = self.out_BHQE[:, :, a:b], self.lse_BHQ[:, :, a:b]
        lse_BHQ = lse_BHQ.to(old_lse.dtype)
        if self._written.is_fresh(a, b):
            old_out.copy_(out_BHQE)
            old_lse.copy_(lse_BHQ)
        else:
            self._written.fill(self.out_BHQE, a, b)
            merge_into(old_out, old_lse, out_BHQE, lse_BHQ)
        self._written.mark(a, b)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The output and logsumexp; rows that saw no key are 0 and -inf."""
        self._written.fill(self.out_BHQE, 0, self.lse_BHQ.shape[2])
        return self.out_BHQE, self.lse_BHQ


class Sum:
    """A running gradient of local tokens, [B, H, N, D]."""

    def __init__(self, total_BHND: Tensor) -> None:
        self.total_BHND = total_BHND
        self._written = _Written(total_BHND.shape[2])

    @staticmethod
    def empty(like_BHND: Tensor) -> Sum:
        kept_in = accumulation_dtype(like_BHND.dtype)
        return Sum(like_BHND.new_empty(like_BHND.shape, dtype=kept_in))

    @staticmethod
    def begun(total_BHND: Tensor) -> Sum:
        """One that holds something for every token already."""
        found = Sum(total_BHND)
        found._written.mark(0, total_BHND.shape[2])
        return found

    def add(self, rows: Run, value_BHND: Tensor) -> None:
        a, b = rows.offset, rows.offset + rows.length
        old = self.total_BHND[:, :, a:b]
        if self._written.is_fresh(a, b):
            old.copy_(value_BHND)
        else:
            self._written.fill(self.total_BHND, a, b)
            old.add_(value_BHND)
        self._written.mark(a, b)

    def finish(self) -> Tensor:
        """The sum; 0 for tokens that nothing was added to."""
        self._written.fill(self.total_BHND, 0, self.total_BHND.shape[2])
        return self.total_BHND


@dataclass(frozen=True, eq=False)
class Gradients:
    """Finished gradients in the accumulation dtype; ``inputs`` those of the captured tensors."""

    dq_BHQD: Tensor
    dk_BGKD: Tensor
    dv_BGKE: Tensor
    inputs: Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Sums:
    """Gradients while pieces are added to them."""

    dq: Sum
    dk: Sum
    dv: Sum
    inputs: Sequence[Tensor | None]

    @staticmethod
    def empty(problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor) -> Sums:
        dq, dk, dv = map(Sum.empty, (q_BHQD, k_BGKD, v_BGKE))
        return Sums(dq, dk, dv, Sums.of_inputs(problem))

    @staticmethod
    def of_inputs(problem: Problem) -> Sequence[Tensor | None]:
        """Zeros for the captured tensors whose gradient is asked for."""
        return [
            torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))
            if i in problem.bias_grads
            else None
            for i, x in enumerate(problem.inputs)
        ]

    def of_heads(self, group: HeadGroup) -> Sums:
        """Some heads' sums, with records of their own; those of captured tensors are shared."""
        return Sums(
            Sum(self.dq.total_BHND[:, group.q]),
            Sum(self.dk.total_BHND[:, group.kv]),
            Sum(self.dv.total_BHND[:, group.kv]),
            self.inputs,
        )

    def with_keys(self, dk_BGKD: Tensor, dv_BGKE: Tensor) -> Sums:
        """The same sums for q and captured tensors, new ones for other keys."""
        return Sums(self.dq, Sum(dk_BGKD), Sum(dv_BGKE), self.inputs)

    def finish(self) -> Gradients:
        return Gradients(self.dq.finish(), self.dk.finish(), self.dv.finish(), self.inputs)


def _fitting(
    problem: Problem,
    q_BHQD: Tensor,
    q_runs: Sequence[Run],
    k_runs: Sequence[Run],
    tiling: Tiling,
    per_pair: int,
    work: Callable[[Piece], bool],
) -> None:
    """Does the work of every piece; one that does not fit in memory is cut and done in parts.

    ``per_pair`` says how many operations a (query, key) pair of one head takes.
    """
    B, H = q_BHQD.shape[:2]
    heads = (problem.first_head, problem.first_head + H)
    found = pieces(problem.spec, q_runs, k_runs, tiling, b=(0, B), h=heads, inputs=problem.inputs)
    for piece in found:
        problem.stats.tiles += 1
        if tried(partial(work, piece)) is not None:
            problem.stats.flops += B * H * round(per_pair * piece.pairs)
            continue
        smaller_tiling = smaller(problem, piece, B, H)
        for part in piece.parts or (piece,):
            _fitting(problem, q_BHQD, [part.q], [part.k], smaller_tiling, per_pair, work)


def _index(problem: Problem, piece: Piece, q_BHQD: Tensor) -> TileIndex:
    def span(start: int, length: int) -> Tensor:
        return torch.arange(start, start + length, device=q_BHQD.device)

    return TileIndex(
        b=span(0, q_BHQD.shape[0]),
        h=span(problem.first_head, q_BHQD.shape[1]),
        q=span(piece.q.position, piece.q.length),
        k=span(piece.k.position, piece.k.length),
        row=span(piece.q.offset, piece.q.length),
    )


def _scores(problem: Problem, piece: Piece, q_BHQD: Tensor) -> Scores:
    """The piece's scale, cap and additive mask, evaluated on this piece only."""
    spec, plain = problem.spec, _unmasked_scores(problem, piece, q_BHQD)
    if piece.keep is None and spec.bias is None:
        return replace(plain, causal=piece.causal)
    index = _index(problem, piece, q_BHQD)
    kept_in = accumulation_dtype(q_BHQD.dtype)
    bias_BHQK = torch.zeros(1, 1, 1, 1, dtype=kept_in, device=q_BHQD.device)
    if spec.bias is not None:
        bias_BHQK = evaluate(spec.bias, index, problem.inputs).to(kept_in)
    if piece.keep is not None:
        keep_BHQK = evaluate(piece.keep, index, problem.inputs).to(torch.bool)
        bias_BHQK = torch.where(keep_BHQK, bias_BHQK, -math.inf)
    shape = [1] * (4 - bias_BHQK.dim()) + list(bias_BHQK.shape)
    Q, K = piece.q.length, piece.k.length
    bias_BHQK = bias_BHQK.view(shape).expand(*shape[:2], Q, K)
    slope_BHQK: Tensor | None = None
    if spec.slope is not None and hides_rows_wholly(bias_BHQK):
        slope_BHQK = evaluate(spec.slope, index, problem.inputs).to(kept_in)
    return replace(plain, bias_BHQK=bias_BHQK, slope_BHQK=slope_BHQK)


def _unmasked_scores(problem: Problem, piece: Piece, q_BHQD: Tensor) -> Scores:
    """The piece's scale, cap and map."""
    spec, mapped = problem.spec, None
    if spec.score_map is not None:
        mapped = TileMap(spec.score_map, _index(problem, piece, q_BHQD), problem.inputs)
    return Scores(scale=spec.scale, soft_cap=spec.soft_cap, map=mapped)


def _with_drops(drops: Drops | None, piece: Piece, scores: Scores) -> Scores:
    """The scores, and which of the piece's weights are kept after their softmax."""
    if drops is None:
        return scores
    return replace(scores, kept_BHQK=drops.kept(piece), share_kept=1 - drops.p)


def _rows(x: Tensor, run: Run) -> Tensor:
    return x[:, :, run.offset : run.offset + run.length]


def attend(
    problem: Problem,
    output: Output,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    q_runs: Sequence[Run],
    k_runs: Sequence[Run],
) -> None:
    """Merges the attention of the queries in ``q_runs`` over the keys in ``k_runs``."""
    drops = Drops.of(problem, q_BHQD, q_runs, k_runs)

    def work(piece: Piece) -> bool:
        scores = _with_drops(drops, piece, _scores(problem, piece, q_BHQD))
        hides = scores.slope_BHQK is not None or hides_rows(scores.bias_BHQK)
        kernel = MATH if hides else problem.kernel
        out_BHQE, lse_BHQ = kernel.forward(
            _rows(q_BHQD, piece.q), _rows(k_BGKD, piece.k), _rows(v_BGKE, piece.k), scores
        )
        output.merge(piece.q, out_BHQE, lse_BHQ)
        return True

    with span(problem.stats, f"{problem.ranks.layer}: tiles", "compute_s"):
        per_pair = flops_per_pair(q_BHQD.shape[3], v_BGKE.shape[3], "forward")
        _fitting(problem, q_BHQD, q_runs, k_runs, problem.tiling, per_pair, work)


def attend_backward(
    problem: Problem,
    sums: Sums,
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
    q_runs: Sequence[Run],
    k_runs: Sequence[Run],
) -> None:
    """Adds the gradients of the pieces; ``out`` and ``lse`` are those of the whole rows."""

    kept_in = accumulation_dtype(q_BHQD.dtype)
    drops = Drops.of(problem, q_BHQD, q_runs, k_runs)

    def work(piece: Piece) -> bool:
        scores = _with_drops(drops, piece, _scores(problem, piece, q_BHQD))
        lse = _rows(lse_BHQ, piece.q)
        rows = (
            _rows(dout_BHQE, piece.q),
            _rows(q_BHQD, piece.q),
            _rows(k_BGKD, piece.k),
            _rows(v_BGKE, piece.k),
            _rows(out_BHQE, piece.q),
        )
        if problem.bias_grads:
            dq, dk, dv, dscores_BHQK = math_backward(*rows, lse, scores, wants_bias=True)
            assert dscores_BHQK is not None, "it was asked for"
            _add_captured(problem, piece, q_BHQD, dscores_BHQK, scores, sums)
        elif scores.slope_BHQK is not None or (
            scores.bias_BHQK is not None and is_deep(lse, kept_in)
        ):
            dq, dk, dv = MATH.backward(*rows, lse, scores)
        else:
            dq, dk, dv = problem.kernel.backward(*rows, lse.to(kept_in), scores)
        sums.dq.add(piece.q, dq)
        sums.dk.add(piece.k, dk)
        sums.dv.add(piece.k, dv)
        return True

    with span(problem.stats, f"{problem.ranks.layer}: tiles, backward", "compute_s"):
        per_pair = flops_per_pair(q_BHQD.shape[3], v_BGKE.shape[3], "backward")
        _fitting(problem, q_BHQD, q_runs, k_runs, problem.tiling, per_pair, work)
        if problem.spec.fully_masked == "absorbed" and problem.spec.keep is not None:
            rows = (dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ)
            _absorbed_backward(problem, sums, rows, q_runs, k_runs)


def _absorbed_backward(
    problem: Problem,
    sums: Sums,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    q_runs: Sequence[Run],
    k_runs: Sequence[Run],
) -> None:
    """Rows without a key give all keys one weight, and gradients to scores as any softmax does."""
    dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ = tensors
    weights_BHQ = (lse_BHQ == -math.inf).to(lse_BHQ.dtype) / problem.spec.kv_len
    open_to_all = replace(problem, spec=replace(problem.spec, keep=None))

    def work(piece: Piece) -> bool:
        weights = _rows(weights_BHQ, piece.q)
        if not bool(weights.any()):
            return True
        wants = bool(problem.bias_grads)
        scores = _unmasked_scores(problem, piece, q_BHQD)
        dq, dk, dv, dscores_BHQK = math_backward(
            _rows(dout_BHQE, piece.q), _rows(q_BHQD, piece.q), _rows(k_BGKD, piece.k),
            _rows(v_BGKE, piece.k), _rows(out_BHQE, piece.q), _rows(lse_BHQ, piece.q), scores,
            wants_bias=wants, weights_BHQ=weights,
        )  # fmt: skip
        if dscores_BHQK is not None:
            _add_captured(problem, piece, q_BHQD, dscores_BHQK, scores, sums)
        sums.dq.add(piece.q, dq)
        sums.dk.add(piece.k, dk)
        sums.dv.add(piece.k, dv)
        return True

    bounded = Tiling(masked=problem.tiling.masked, plain=problem.tiling.masked)
    per_pair = flops_per_pair(q_BHQD.shape[3], v_BGKE.shape[3], "backward")
    _fitting(open_to_all, q_BHQD, q_runs, k_runs, bounded, per_pair, work)


def _add_captured(
    problem: Problem,
    piece: Piece,
    q_BHQD: Tensor,
    dscores_BHQK: Tensor,
    scores: Scores,
    sums: Sums,
) -> None:
    """Adds the gradients of what bias and score map read."""
    if problem.spec.bias is not None:
        index = _index(problem, piece, q_BHQD)
        bias_gradients.add(problem.spec.bias, dscores_BHQK, index, problem.inputs, sums.inputs)
    if isinstance(scores.map, TileMap):
        scores.map.add_captured(sums.inputs)
