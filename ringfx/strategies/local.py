"""One rank alone: its kernel over the whole sequence, whatever the strategy."""

from __future__ import annotations

from torch import Tensor

from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients, Output, Sums, attend, attend_backward

__all__ = ["backward", "forward"]


def forward(
    problem: Problem, q_BHQD: Tensor, k_BGKD: Tensor, v_BGKE: Tensor
) -> tuple[Tensor, Tensor]:
    """The output and its logsumexp."""
    output = Output.empty(problem, q_BHQD, v_BGKE.shape[-1])
    attend(problem, output, q_BHQD, k_BGKD, v_BGKE, problem.q_runs(0), problem.k_runs(0))
    return output.finish()


def backward(
    problem: Problem,
    dout_BHQE: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    out_BHQE: Tensor,
    lse_BHQ: Tensor,
) -> Gradients:
    """The gradients of queries, keys and values."""
    sums = Sums.empty(problem, q_BHQD, k_BGKD, v_BGKE)
    attend_backward(
        problem, sums, dout_BHQE, q_BHQD, k_BGKD, v_BGKE, out_BHQE, lse_BHQ, problem.q_runs(0),
        problem.k_runs(0),
    )  # fmt: skip
    return sums.finish()
