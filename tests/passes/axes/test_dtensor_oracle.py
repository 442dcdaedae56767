"""DTensor's sharding strategies as a second opinion on every row of the axis table.

For each label of each sample call, the operands are laid out as DTensors split along that label on
a mesh of two (nothing is computed: only placements are propagated). Where DTensor takes them as
they are, without moving anything, its result must lie as the row says: split along the same label,
a partial sum, or whole. Where DTensor has no strategy, or would redistribute first, it has no
opinion. The other direction is held too: what DTensor splits without moving anything and our row
keeps whole is listed here by name, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisSharing
from tests.passes.axes.rule_samples import samples
from tests.passes.axes.rule_trials import Dims, Trial, sharing, tried

aten = torch.ops.aten
RANKS = 2
SIZES = (6, 8, 10, 4)

ONLY_SUMS = "a partial maximum, product or norm: our partial results are sums"
UNEVEN = "an average of averages: wrong for parts of different length, or with ignored tokens"
DRAWN = "two results of one draw, which is the whole tensor's: each rank would draw other numbers"
KEPT_WHOLE: Mapping[Any, str] = {
    **dict.fromkeys(
        (
            aten.max.default, aten.min.default, aten.amax.default, aten.amin.default,
            aten.prod.default, aten.prod.dim_int, aten.any.default, aten.any.dim,
            aten.all.default, aten.all.dim, aten.linalg_vector_norm.default,
            aten.norm.Scalar, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dtype,
            aten.norm.ScalarOpt_dim_dtype, aten.any.dims, aten.aminmax.default,
        ),
        ONLY_SUMS,
    ),
    **dict.fromkeys(
        (
            aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default,
            aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default,
            aten.huber_loss.default, aten.binary_cross_entropy.default,
            aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default,
        ),
        UNEVEN,
    ),
    **dict.fromkeys(
        (aten.native_dropout.default, aten.rrelu_with_noise_functional.default), DRAWN
    ),
    aten.bucketize.Tensor: "counts against parts of the borders: a sum; borders are small",
    aten.cumprod.default: "DTensor is wrong: a product over the split axis needs what is before",
}  # fmt: skip
"""Operators of which DTensor splits more than our row does, and why the row does not."""

ONLY_A_SHAPE = {aten.expand_as.default}
"""Of the other operand only its shape is read, which DTensor leaves whole: no opinion."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def placement(dims: Dims | None, label: Any) -> Placement | None:
    """Where a tensor with these labels lies when this one is split; None: no DTensor says so."""
    places = [d for d, dim in enumerate(dims or ()) if label in dim]
    if not places:
        return Replicate()
    first = dims is not None and dims[places[0]][0] == label
    return Shard(places[0]) if len(places) == 1 and first else None


def split_operands(trial: Trial, label: Any, mesh: DeviceMesh) -> list[DTensor] | None:
    found = []
    for x, dims in zip(trial.operands, trial.operand_dims, strict=True):
        place = placement(dims, label)
        if place is None:
            return None
        local = x.chunk(RANKS, place.dim)[0] if isinstance(place, Shard) else x
        whole = {"shape": x.shape, "stride": x.stride()}
        found.append(DTensor.from_local(local, mesh, [place], run_check=False, **whole))
    return found


def opinion(trial: Trial, label: Any, mesh: DeviceMesh) -> tuple[Placement, ...] | None:
    """How DTensor's results lie, or None where it has no opinion on operands that lie so."""
    given = split_operands(trial, label, mesh)
    if given is None:
        return None
    values = iter(given)
    node = trial.node
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: next(values))
    dispatcher = DTensor._op_dispatcher
    info = dispatcher.unwrap_to_op_info(trial.sample.op, args, kwargs)
    before = [spec.placements for spec in info.schema.args_spec]
    try:
        found = dispatcher.sharding_propagator.propagate_op_sharding_non_cached(info.schema)
    except Exception:  # of many kinds where it has no strategy for a call
        return None
    after = found.redistribute_schema
    if after is not None and [spec.placements for spec in after.args_spec] != before:
        return None
    specs = found.output_spec
    specs = specs if isinstance(specs, (tuple, list)) else [specs]
    return tuple(spec.placements[0] for spec in specs if spec is not None)


def expected(trial: Trial, label: Any) -> tuple[Placement | None, ...]:
    if sharing(trial, label) is AxisSharing.PARTIAL_SUM:
        mean = isinstance(trial.axes.how, how.Sum) and trial.axes.how.mean
        return tuple(Partial("avg" if mean else "sum") for _ in trial.result_dims)
    return tuple(placement(dims, label) for dims in trial.result_dims)


def labels(trial: Trial) -> Iterator[Any]:
    """Those that cut an operand."""
    for label, size in trial.sizes().items():
        carried = any(label in dim for dims in trial.operand_dims for dim in dims or ())
        if size % RANKS == 0 and carried:
            yield label


def opinions(mesh: DeviceMesh) -> Iterator[tuple[Trial, Any, tuple[Placement, ...]]]:
    torch.manual_seed(0)
    for sample in samples(*SIZES):
        trial = tried(sample)
        for label in labels(trial):
            theirs = opinion(trial, label, mesh)
            if theirs is not None:
                yield trial, label, theirs


def test_dtensor_agrees_with_every_row_on_which_it_has_an_opinion(mesh: DeviceMesh) -> None:
    compared, differences, kept_whole = set(), [], {}
    for trial, label, theirs in opinions(mesh):
        op, ours = trial.sample.op, expected(trial, label)
        if sharing(trial, label) is AxisSharing.NEEDS_ALL:
            kept_whole[op] = f"{trial.sample}, {label}: {theirs}"
        elif None not in ours and op not in ONLY_A_SHAPE:
            compared.add(op)
            if ours != theirs:
                differences.append(f"{trial.sample}, {label}: ours {ours}, DTensor's {theirs}")
    assert differences == []
    assert {str(op): said for op, said in kept_whole.items() if op not in KEPT_WHOLE} == {}
    assert kept_whole.keys() == KEPT_WHOLE.keys(), "a reason that is no longer needed"
    assert len(compared) > 200
