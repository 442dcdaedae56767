"""The attention operator: what the rewritten program calls, opaque to compilers.

Two ``torch.library`` operators, ``ringfx::attention`` and ``ringfx::attention_backward``. Their
fake implementations need no process group and no rank: shapes and strides are the same on every
rank, so one program serves them all; the group's name is resolved when the operator really runs.

Shapes: B batch, H query heads, G key/value heads, Q local queries, K local keys, D the head dim of
q and k, E that of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ringfx.comm import stats
from ringfx.comm.autograd_function import register_autograd
from ringfx.comm.double_backward import refuse_double_backward
from ringfx.comm.process_group import Ranks
from ringfx.cost_model.prediction.strategy import Backward, Forward
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ops import checks
from ringfx.ops.kernels.kernel import choose
from ringfx.ops.kernels.logsumexp import logsumexp_dtype
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.empty_rows import (
    add_sinks,
    fill_mean,
    fill_nan,
    lost_rows,
    mean_gradient,
    nan_gradient,
    refuse_lost_digits,
    sink_gradient,
    warn_of_lost_digits,
)
from ringfx.ops.tiling.pieces import tiling_of
from ringfx.strategies import Strategy, dilated, local
from ringfx.strategies.keys import strategy_of

__all__ = ["attention"]

Tensor = torch.Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    *,
    spec: str,
    strategy: str,
    layout: str,
    group: str,
    name: str = "",
    kernels: str = "",
    sizes: Sequence[int] = (),
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks.

    Parameters
    ----------
    q, k, v
        This rank's tokens, [B, H, Q, D], [B, G, K, D] and [B, G, K, E], padded to
        ``Layout(layout, length, ranks).local_length``.
    inputs
        The whole tensors that the tile functions of ``spec`` read, the sinks after them if there
        are any, and last the seed of a dropout, one int64; the same on all ranks. Their gradients
        are complete on every rank. Of those that are read at ``("row",)`` each rank has the rows of
        its own queries, and their gradient.
    spec
        ``AttentionSpec.to_json()``.
    strategy
        The key of a strategy (``ringfx.strategies.keys``): its name, of ringfx's own.
    layout
        ``contiguous`` or ``zigzag``.
    group
        Name of the process group; "" for one rank alone.
    name
        The layer, for error texts.
    kernels
        The kernels that the plan counts on (``KernelChoice.text``); "": there is no plan.
    sizes
        The numbers that ``spec`` leaves open (``AttentionSpec.from_json``), in a program that
        serves several lengths.

    Returns
    -------
    Tensor
        [B, H, Q, E] in q's dtype; padded rows are 0.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
    # A model may keep an index table or a mask on the CPU, and read it from another device.
    captured = [x.to(q.device) for x in inputs]
    settings = (spec, strategy, layout, group, name, kernels, list(sizes))
    out, _ = torch.ops.ringfx.attention(q, k, v, captured, *settings)
    result: Tensor = out
    return result


@torch.library.custom_op("ringfx::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: list[Tensor],
    spec: str,
    strategy: str,
    layout: str,
    group: str,
    name: str,
    kernels: str,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    settings = (AttentionSpec.from_json(spec, sizes), layout, group, name, kernels)
    with _plain_arithmetic(q):
        chosen = strategy_of(strategy, name)
        problem, sinks_H = _problem(chosen, q, k, v, inputs, *settings, ())
        problem.stats.forwards += 1
        out_BHQE, lse_BHQ = _forward_of(chosen, problem)(problem, q, k, v)
        if _may_lose_rows(problem, "mean", "absorbed"):
            fill_mean(problem, out_BHQE, lse_BHQ, v)
        if _may_lose_rows(problem, "nan"):
            fill_nan(problem, out_BHQE, lse_BHQ)
        if _may_lose_digits(problem, q):
            warn_of_lost_digits(problem, lse_BHQ)
        if sinks_H is not None:
            out_BHQE, lse_BHQ = add_sinks(out_BHQE, lse_BHQ, sinks_H)
        return _by_tokens(out_BHQE, q.dtype), _own(lse_BHQ)


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: list[Tensor],
    spec: str,
    strategy: str,
    layout: str,
    group: str,
    name: str,
    kernels: str,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    B, H, Q, _ = q.shape
    has_bias = _form(spec, sizes).bias is not None
    return (
        q.new_empty(B, Q, H, v.shape[3]).transpose(1, 2),
        q.new_empty(B, H, Q, dtype=logsumexp_dtype(q.dtype, has_bias=has_bias)),
    )


@torch.library.custom_op("ringfx::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: list[Tensor],
    wanted: list[int],
    spec: str,
    strategy: str,
    layout: str,
    group: str,
    name: str,
    kernels: str,
    sizes: Sequence[int],
) -> list[Tensor]:
    """dq, dk, dv and the gradients of the inputs at the positions in ``wanted``."""
    settings = (AttentionSpec.from_json(spec, sizes), layout, group, name, kernels)
    with _plain_arithmetic(q):
        chosen = strategy_of(strategy, name)
        problem, sinks_H = _problem(chosen, q, k, v, inputs, *settings, wanted)
        problem.stats.backwards += 1
        if _may_lose_digits(problem, q):
            refuse_lost_digits(problem, lse, dout)
        if _may_lose_rows(problem, "nan"):
            out = out.masked_fill(lost_rows(lse), 0.0)
        sums = _backward_of(chosen, problem)(problem, dout, q, k, v, out, lse)
        if _may_lose_rows(problem, "mean"):
            mean_gradient(problem, sums.dv_BGKE, dout, lse)
        if _may_lose_rows(problem, "nan"):
            nan_gradient(problem, sums.dv_BGKE, lse)
        found = list(sums.inputs)
        if sinks_H is not None:
            position = len(problem.inputs)
            found.append(sink_gradient(dout, out, lse, sinks_H) if position in wanted else None)
        operation = "backward: sum of the bias gradients"
        own = tiles.own_rows(*problem.spec.functions)
        if sinks_H is not None and problem.whole_queries:
            own |= {len(problem.inputs)}  # every rank has seen all rows
        extra = [
            (
                _asked(found[i])
                if i in own
                else problem.ranks.all_reduce(operation, _asked(found[i]))
            ).to(inputs[i].dtype)
            for i in wanted
        ]
        dq, dk, dv = sums.dq_BHQD.to(q.dtype), sums.dk_BGKD.to(k.dtype), sums.dv_BGKE.to(v.dtype)
        return [*(_own(x) for x in (dq, dk, dv)), *(_own(x) for x in extra)]


@_attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: list[Tensor],
    wanted: list[int],
    spec: str,
    strategy: str,
    layout: str,
    group: str,
    name: str,
    kernels: str,
    sizes: Sequence[int],
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *(inputs[i] for i in wanted))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captured, *settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, *captured)
    ctx.settings = tuple(settings)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *captured = ctx.saved_tensors
    needs = ctx.needs_input_grad[3]
    flags = needs if isinstance(needs, (list, tuple)) else [needs] * len(captured)
    trained = _trained(_form(ctx.settings[0], ctx.settings[-1]), len(captured))
    wanted = [i for i, flag in enumerate(flags) if flag and i in trained]
    dq, dk, dv, *extra = torch.ops.ringfx.attention_backward(
        dout, q, k, v, out, lse, captured, wanted, *ctx.settings
    )
    captured_grads: list[Tensor | None] = [None] * len(captured)
    for position, gradient in zip(wanted, extra, strict=True):
        captured_grads[position] = gradient
    *texts, sizes = ctx.settings
    # torch takes an empty list for one of tensors, and any other list of numbers for one argument.
    return dq, dk, dv, captured_grads, *[None] * len(texts), None if sizes else []


def _form(spec: str, sizes: Sequence[int]) -> AttentionSpec:
    """What holds at every length: while a program is traced, sizes are symbols."""
    return AttentionSpec.from_json(spec, [1] * len(sizes))


def _trained(spec: AttentionSpec, num_inputs: int) -> set[int]:
    """Which captured tensors a gradient can reach: not those that only a mask reads."""
    sinks = num_inputs - 1 - (spec.dropout > 0)
    return {*tiles.inputs_used(spec.bias, spec.score_map), *([sinks] if spec.sinks else [])}


register_autograd(_attention, _backward, setup_context=_setup_context)
refuse_double_backward(_attention_backward)


def _by_tokens(x_BHQE: Tensor, dtype: torch.dtype) -> Tensor:
    """x in its own memory, a token's heads together, as torch's attention gives it: what joins the
    heads then is a view, where backward would keep a copy beside the output."""
    B, H, Q, E = x_BHQE.shape
    own_BQHE = x_BHQE.new_empty(B, Q, H, E, dtype=dtype)
    own_BQHE.copy_(x_BHQE.transpose(1, 2))
    return own_BQHE.transpose(1, 2)


def _plain_arithmetic(q: Tensor) -> torch.autocast:
    """Inside the operator dtypes are chosen here: autocast would round the float32 sums."""
    return torch.autocast(q.device.type, enabled=False)


def _problem(
    strategy: Strategy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    spec: AttentionSpec,
    layout: str,
    group: str,
    name: str,
    kernels: str,
    wanted: Sequence[int],
) -> tuple[Problem, Tensor | None]:
    """The call as a value, checked; the sinks and the seed apart from other captured tensors."""
    ranks = Ranks.named(group, name)
    kind = checks.layout_kind(layout, name)
    whole_queries = strategy.whole_queries and ranks.size > 1
    checks.shapes(q, k, v, spec, kind, ranks, whole_queries=whole_queries)
    checks.runs(strategy, q, k, v, spec, ranks)
    seed = checks.seed(inputs, q.shape[0], spec, name) if spec.dropout else None
    captured = inputs[:-1] if spec.dropout else inputs
    sinks_H = checks.sinks(captured, q.shape[1], name) if spec.sinks else None
    captured = captured[:-1] if spec.sinks else captured
    bias_grads = tuple(i for i in wanted if i < len(captured))
    checks.bias_gradients(spec, bias_grads, name)
    kernel = choose(
        q.device,
        q.dtype,
        soft_cap=spec.maps_scores,
        math_only=strategy.math_only or spec.dropout > 0 or bool(bias_grads),
        all_keys=strategy.all_keys,
        head_dim=max(q.shape[3], v.shape[3]),
        named=kernels,
    )
    found = stats.layer(name)
    found.kernel = kernel.name
    if kernels and not bias_grads and found.ran.get(kernels) != kernel.name:
        found.ran = {**found.ran, kernels: kernel.name}
    problem = Problem(
        spec=spec,
        inputs=captured,
        ranks=ranks,
        layout=kind,
        kernel=kernel,
        tiling=tiling_of(q, kernel.stores_scores),
        stats=found,
        seed=seed,
        bias_grads=bias_grads,
        head_groups=strategy.head_groups,
        whole_queries=whole_queries,
    )
    return problem, sinks_H


def _forward_of(strategy: Strategy, problem: Problem) -> Forward:
    """One rank alone runs the local kernel, whatever the strategy.

    Branches are given to a strategy one by one. One that computes all queries of some heads
    exchanges all rows once, and then has all branches at home.
    """
    if problem.ranks.size == 1:
        return local.forward
    if problem.spec.branches and strategy.own_queries:
        return partial(dilated.forward, strategy.forward)
    return strategy.forward


def _backward_of(strategy: Strategy, problem: Problem) -> Backward:
    if problem.ranks.size == 1:
        return local.backward
    if problem.spec.branches and strategy.own_queries:
        return partial(dilated.backward, strategy.backward)
    return strategy.backward


def _may_lose_digits(problem: Problem, q: Tensor) -> bool:
    """Of narrower numbers even the lowest are counted exactly (``logsumexp.stepped``)."""
    return problem.spec.bias is not None and q.dtype == torch.float64


def _may_lose_rows(problem: Problem, *becomes: str) -> bool:
    """Whether rows without any key must become the mean of v, or NaN; the same on all ranks."""
    spec = problem.spec
    keeps_some = spec.bias is None and (spec.keep is None or spec.is_causal)
    return spec.fully_masked in becomes and not keeps_some


def _own(x: Tensor) -> Tensor:
    """Contiguous, as the fake implementation says, in storage shared with no other result."""
    if x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size():
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _asked(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "a gradient that was asked for was computed"
    return gradient
