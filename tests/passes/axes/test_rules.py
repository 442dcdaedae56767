"""Every row of the axis table is held against the operator itself, executed on parts.

For each label that a row lets go split: cut the operands along it, run the operator on each part
(sizes in its arguments made local), and the parts joined, or added where the row says SUM, must be
the whole result. Padded tokens are given the row's fill where it names one, and garbage elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial as partial_of
from typing import Any

import pytest
import torch

from ringfx.comm import halo, halo_pools, halo_transposed, redistribute, turn
from ringfx.ir.markers import every_token
from ringfx.ops import attention
from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisSharing
from ringfx.passes.axes.rules import RULES, matrices, parallel
from ringfx.passes.axes.rules.attention import KERNELS
from ringfx.passes.axes.rules.contraction import GROUPED
from tests.passes.axes.rule_samples import samples
from tests.passes.axes.rule_trials import Dims, Trial, sharing, tried
from tests.passes.axes.sample import Sample

aten = torch.ops.aten
SIZES = {"different": (6, 7, 8, 9), "equal": (6, 6, 6, 6), "square": (6, 8, 8, 6)}

NOT_SAMPLED = {
    attention: "the canonical operator: tests/ops runs it on ranks",
    every_token: "all of an axis, another one from there on: tests/end_to_end/test_matrices.py",
    halo.convolution: "sees neighbours: tests/end_to_end/test_token_axes.py",
    halo_pools.pool: "sees neighbours: tests/end_to_end/test_pools.py",
    halo_transposed.transposed_convolution: ("sees neighbours: tests/end_to_end/test_upsampled.py"),
    redistribute.reshard: "moves tokens between ranks: tests/end_to_end/test_token_axes.py",
    turn.turn: "moves tokens between ranks: tests/end_to_end/test_without_attention.py",
    turn.apart: "ends axes: tests/end_to_end/test_without_attention.py",
    **dict.fromkeys(
        parallel.RULES, "messages to other ranks: tests/compile/test_tensor_parallel.py"
    ),
    **dict.fromkeys(GROUPED, "whole along rows, except among a rank's own: tests/end_to_end"),
    aten.scaled_dot_product_attention.default: "whole along tokens; see the test of its heads",
    **dict.fromkeys(KERNELS, "whole: left as they stand only where detection declined them"),
}
NEVER_SPLIT = {
    # A random draw or a count over the whole axis is made whole and then cut.
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default,
    aten.eye.default, aten.eye.m, aten.rand.default, aten.randn.default,
    aten.randint.default, aten.randint.low, aten.randperm.default,
    aten.bernoulli.default,
    # The whole decides each element.
    aten.max.default, aten.min.default, aten.prod.default, aten.any.default, aten.all.default,
    aten.var.default, aten.norm.Scalar, aten.repeat_interleave.self_Tensor,
    # No dimension.
    aten.scalar_tensor.default,
}  # fmt: skip
UNDEFINED_VALUES = {
    aten.empty_like.default,
    aten.empty.memory_format,
    aten.new_empty.default,
}


def opened(dims: Dims, label: Any, sizes: dict[Any, int]) -> Iterator[tuple[int, int, int]]:
    """(dimension, outer, inner) of each place where a label stands."""
    for d, dim in enumerate(dims):
        if label in dim:
            at = dim.index(label)
            outer = inner = 1
            for other in dim[:at]:
                outer *= sizes[other]
            for other in dim[at + 1 :]:
                inner *= sizes[other]
            yield d, outer, inner


def cut(x: torch.Tensor, dims: Dims | None, label: Any, part: range, sizes: Any) -> torch.Tensor:
    for d, outer, inner in opened(dims or (), label, sizes):
        wide = x.unflatten(d, (outer, sizes[label], inner))
        x = wide.narrow(d + 1, part.start, len(part)).flatten(d, d + 2)
    return x


def run(
    trial: Trial, operands: Sequence[torch.Tensor], op: Any = None, **changed: Any
) -> tuple[Any, ...]:
    """The call on other operands, with some arguments changed."""
    values = iter(operands)
    node, target = trial.node, trial.sample.op
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: next(values))
    names = [a.name for a in target._schema.arguments]
    given = list(args)
    for name, value in changed.items():
        given[names.index(name)] = value
    result = (op or target)(*given, **kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def local(trial: Trial, label: Any, part: range, sizes: dict[Any, int]) -> tuple[Any, ...]:
    operands = [
        cut(x, dims, label, part, sizes)
        for x, dims in zip(trial.operands, trial.operand_dims, strict=True)
    ]
    shape = list(trial.results[0].shape)
    for d, _, _ in opened(trial.result_dims[0], label, sizes):
        shape[d] = shape[d] // sizes[label] * len(part)
    if isinstance(trial.axes.how, how.Reshape):
        return (operands[0].reshape(shape),)
    if isinstance(trial.axes.how, how.SizeArgument):
        return run(trial, operands, **{trial.axes.how.name: shape})
    return run(trial, operands)


def check_local(trial: Trial, label: Any, at: int) -> bool:
    """Compares the parts with the whole; False if no result carries the label."""
    sizes = trial.sizes()
    parts = (range(0, at), range(at, sizes[label]))
    if not any(label in dim for dims in trial.result_dims for dim in dims):
        return False
    locals_ = [local(trial, label, part, sizes) for part in parts]
    for i, (whole, dims) in enumerate(zip(trial.results, trial.result_dims, strict=True)):
        for part, results in zip(parts, locals_, strict=True):
            expected = cut(whole, dims, label, part, sizes)
            assert results[i].shape == expected.shape, (str(trial.sample), label)
            drawn = isinstance(trial.axes.how, how.Draw)
            if trial.sample.op not in UNDEFINED_VALUES and not drawn:
                torch.testing.assert_close(
                    results[i], expected, msg=lambda m: f"{trial.sample}, {label}: {m}"
                )
    return True


def summed(trial: Trial) -> how.Sum:
    return trial.axes.how if isinstance(trial.axes.how, how.Sum) else how.Sum()


def padded(trial: Trial, i: int, x: torch.Tensor, label: Any) -> torch.Tensor:
    """One more token, holding the row's fill or, where it names none, garbage."""
    for d, dim in enumerate(trial.operand_dims[i] or ()):
        if label in dim:
            assert dim == (label,), "a summed label stands alone in an operand"
            one = x.narrow(d, 0, 1)
            value = summed(trial).fill.get(i)
            token = torch.full_like(one, value) if value is not None else one * 2 + 1
            x = torch.cat([x, token], d)
    return x


def check_sum(trial: Trial, label: Any, at: int) -> None:
    sizes = trial.sizes()
    total: Any = 0
    if isinstance(trial.axes.how, how.Pick):
        check_pick(trial, label)
        return
    for part in (range(0, at), range(at, sizes[label])):
        operands = [
            padded(trial, i, cut(x, dims, label, part, sizes), label)
            for i, (x, dims) in enumerate(zip(trial.operands, trial.operand_dims, strict=True))
        ]
        total = total + partial(trial, operands)
    if summed(trial).mean:
        total = total / (trial.operands[0].numel() // trial.results[0].numel())
    (whole,) = trial.results
    torch.testing.assert_close(total, whole, msg=lambda m: f"{trial.sample}, {label}: {m}")


def check_pick(trial: Trial, label: Any) -> None:
    """The rank that has the element gives its row, and all others zero."""
    (x,), (whole,) = trial.operands, trial.results
    ((d, _, _),) = opened(trial.operand_dims[0] or (), label, trial.sizes())
    assert isinstance(trial.axes.how, how.Pick)
    row = x.select(d, trial.axes.how.element)
    torch.testing.assert_close(row.reshape(whole.shape), whole)


def partial(trial: Trial, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    if not summed(trial).mean:
        return run(trial, operands)[0]  # type: ignore[no-any-return]
    sums = {aten.mean.default: aten.sum.default, aten.mean.dim: aten.sum.dim_IntList}
    return run(trial, operands, op=sums[trial.sample.op])[0]  # type: ignore[no-any-return]


def checked_labels(trial: Trial) -> list[Any]:
    """Checks every label that the row lets go split; returns those."""
    checked = []
    for label, size in trial.sizes().items():
        share = sharing(trial, label)
        if size < 2 or share is AxisSharing.NEEDS_ALL:
            continue
        for at in (1, size // 2):  # a rank may hold a single token
            if share is AxisSharing.PARTIAL_SUM:
                check_sum(trial, label, at)
                checked.append(label)
            elif check_local(trial, label, at):
                checked.append(label)
    return checked


def every_sample() -> list[Any]:
    torch.manual_seed(0)
    return [
        pytest.param(sample, id=f"{name}-{i}-{sample.op}")
        for name, sizes in SIZES.items()
        for i, sample in enumerate(samples(*sizes))
    ]


@pytest.mark.parametrize("sample", every_sample())
def test_a_row_does_on_parts_what_it_says(sample: Sample) -> None:
    trial = tried(sample)
    labels = checked_labels(trial)
    assert bool(labels) == (sample.splits and sample.op not in NEVER_SPLIT), str(sample)


EDGES = {
    "zeros": [0.0, -0.0],
    "ties": [1.0, 1.0, 2.0],
    "equal": [1.0],
    "subnormal": [5e-324, -5e-324, 0.0, 1.0],
    "infinite": [1.0, torch.inf, -2.0, 0.0, 0.5, -torch.inf, 3.0],
    "NaN": [1.0, torch.nan, -2.0, 0.0, 0.5, 3.0, 0.25],
}


def edged(value: Any, numbers: Sequence[float]) -> Any:
    """The same call of other numbers."""
    if isinstance(value, list):
        return [edged(v, numbers) for v in value]
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float64:
        return value
    found = torch.tensor(numbers, dtype=torch.float64)
    return found.repeat(value.numel() // len(numbers) + 1)[: value.numel()].view(value.shape)


REJECTS_EDGES = {
    aten.bernoulli.default, aten.bernoulli.Tensor, aten.binary_cross_entropy.default,
    aten.multinomial.default, aten.poisson.default, aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor, *matrices.RULES,
}  # fmt: skip
"""The operator itself raises where numbers are no probabilities, rates, deviations or entries of a
matrix that it can factor."""


@pytest.mark.parametrize("edge", EDGES)
def test_a_row_does_on_parts_what_it_says_at_edges(
    edge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = partial_of(torch.testing.assert_close, equal_nan=True)
    monkeypatch.setattr(torch.testing, "assert_close", exact)
    for sample in samples(*SIZES["different"]):
        args = tuple(edged(a, EDGES[edge]) for a in sample.args)
        try:
            trial = tried(replace(sample, args=args))
        except RuntimeError:
            assert sample.op in REJECTS_EDGES, str(sample)
            continue
        checked_labels(trial)


def test_every_row_has_a_sample_or_a_reason() -> None:
    sampled = {sample.op for sample in samples(*SIZES["different"])}
    missing = [str(op) for op in RULES if op not in sampled and op not in NOT_SAMPLED]
    assert missing == []
    assert len([op for op in RULES if op in sampled]) == len(RULES) - len(NOT_SAMPLED)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 5, 6, dtype=torch.bool)])
def test_attention_as_it_was_written_keeps_batch_and_heads_unless_a_mask_has_them(
    mask: torch.Tensor | None,
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (5, 6, 6))
    trial = tried(Sample(aten.scaled_dot_product_attention.default, (q, k, v, mask)))
    labels = set(checked_labels(trial))
    assert labels == ({"...1", "...2"} if mask is None else set())
