"""States sharded over the sequence's and the data parallel ranks; in other types than they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

import ringfx
from ringfx.errors import InvalidArgument
from tests.models.wide import VOCABULARY, WideModel
from tests.support.harness import RankPool

STEPS = 2
SEQ_LEN = 22


def batch(step: int, replica: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(10 * step + replica)
    tokens, labels = (torch.randint(VOCABULARY, (2, SEQ_LEN), generator=made) for _ in range(2))
    return {"tokens": tokens, "labels": labels}


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs)


def results(model: nn.Module) -> list[Tensor]:
    return [whole(x) for p in model.parameters() for x in (p.grad, p)]


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """One step with clipped gradients; what they are before (AdamW does not see their scale)."""
    grads = [whole(p.grad) for p in model.parameters()]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return [*grads, *map(whole, model.parameters())]


def mean_over_batches() -> list[Tensor]:
    """The unsplit model, trained with the mean of both replicas' losses."""
    model = WideModel("smoothed", tied=True).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(model(**batch(step, replica)) / 2 for replica in range(2)).backward()
        found += step_of(model, optimizer)
    return found


def on_a_2x2_mesh(given: str, compiler: Any) -> tuple[float, float]:
    """How far from it is one of two sequences of two ranks; the share of states of a rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    if given == "2-D":
        over: DeviceMesh = mesh["dp_shard", "cp"]
    else:
        over = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    model = WideModel("smoothed", tied=True).double()
    total = sum(p.numel() for p in model.parameters())
    split = ringfx.optimize(model, mesh=mesh["cp"], shard_states=over, compiler=compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        split(**batch(step, mesh.get_local_rank("dp_shard"))).backward()
        found += step_of(model, optimizer)
    held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    return relative(found, mean_over_batches()), held / total


@pytest.mark.parametrize(
    ("given", "compiler"),
    [("2-D", "aot_eager"), pytest.param("flattened", "eager", marks=pytest.mark.slow)],
)
def test_gradients_are_summed_over_tokens_and_averaged_over_data(
    ranks4: RankPool, given: str, compiler: str
) -> None:
    for worst, share in ranks4.run(on_a_2x2_mesh, given, compiler):
        assert worst < 1e-9
        assert share <= 1.05 / 4


class Repeated(WideModel):
    """With a parameter that every rank uses alike: its gradient is equal on all of a sequence."""

    def __init__(self) -> None:
        super().__init__("smoothed")
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = super().forward(tokens, labels)
        return loss * self.scale.square().mean() + self.scale.sum()


def repeated_gradient() -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    model, alone = Repeated().double(), Repeated().double()
    split = ringfx.optimize(
        model, mesh=mesh["cp"], shard_states=mesh["dp_shard", "cp"], compiler="aot_eager"
    )
    split(**batch(0, mesh.get_local_rank("dp_shard"))).backward()
    sum(alone(**batch(0, replica)) / 2 for replica in range(2)).backward()
    return whole(model.scale.grad), whole(alone.scale.grad)


def test_what_every_rank_computes_alike_is_averaged_over_data_too(ranks4: RankPool) -> None:
    for found, expected in ranks4.run(repeated_gradient):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def narrower(compiler: Any) -> tuple[float, set[torch.dtype], set[torch.dtype]]:
    """Rows of float64, of which the model computes in float32; sums in float64."""
    model, alone = WideModel("smoothed").double(), WideModel("smoothed").double()
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    split = ringfx.optimize(model, shard_states=True, mp_policy=policy, compiler=compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad(), other.zero_grad()
        split(**batch(step, 0)).backward()
        used = {name: p.float() for name, p in alone.named_parameters()}
        functional_call(alone, used, kwargs=batch(step, 0)).backward()
        optimizer.step(), other.step()
    gathered = split(**batch(0, 0)).dtype
    kept = {x.dtype for p in model.parameters() for x in (p, whole(p.grad))}
    return relative(results(model), results(alone)), kept, {gathered}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_parameters_are_used_and_gradients_summed_in_the_types_asked_for(
    ranks2: RankPool, compiler: str
) -> None:
    for worst, kept, used in ranks2.run(narrower, compiler):
        assert worst < 2e-4  # of float32
        assert kept == {torch.float64}
        assert used == {torch.float32}


def refused(what: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    model: Any = WideModel()
    options: dict[str, Any] = {"mesh": mesh["cp"], "shard_states": mesh["dp_shard", "cp"]}
    if what == "other ranks":
        options["shard_states"] = mesh["dp_shard"]
    elif what == "data alone":
        options |= {"mesh": init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "one"))["one"]}
    elif what == "fully_shard":
        fully_shard(model, mesh=mesh["cp"])
    elif what == "a number":
        model.factor = nn.Parameter(torch.ones(()))
    elif what == "a policy alone":
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    elif what == "several types":
        model.head.double()
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    elif what == "ranks of a plan":
        options["shard_states"] = 4
    try:
        ringfx.optimize(model, **options)
    except InvalidArgument as error:
        return str(error)
    return "nothing was refused"


WORDS = {
    "other ranks": "do not contain the sequence's",
    "data alone": "torch.distributed.fsdp.fully_shard",
    "fully_shard": "the model was given to fully_shard already",
    "a number": "factor has no dimension to be cut by",
    "a policy alone": "shard_states=True too",
    "several types": "head.weight of torch.float64",
    "ranks of a plan": "a number of ranks is for ringfx.plan",
}


def all_refused() -> dict[str, str]:
    return {what: refused(what) for what in WORDS}


def test_what_cannot_work_is_refused_by_name(ranks4: RankPool) -> None:
    for texts in ranks4.run(all_refused):
        for what, words in WORDS.items():
            assert words in texts[what], what


def test_a_plan_counts_the_ranks_and_types_of_states() -> None:
    given = {k: torch.zeros_like(v) for k, v in batch(0, 0).items()}
    parts = []
    for ranks, policy in ((2, None), (8, None), (8, torch.bfloat16)):
        plan = ringfx.plan(
            WideModel(), (), given, world_size=2, optimizer="adamw", shard_states=ranks,
            mp_policy=MixedPrecisionPolicy(param_dtype=policy) if policy else None,
        )  # fmt: skip
        parts.append({p.cause: p.bytes for p in plan.memory.parts})
    names = ("sharded parameters", "sharded optimizer state")
    for name in names:
        assert parts[0][name] / parts[1][name] == pytest.approx(4, rel=0.01)
        assert parts[1][name] == parts[2][name]
    assert parts[1]["gathered parameters"] == 2 * parts[2]["gathered parameters"]


def test_a_plan_refuses_ranks_that_do_not_divide() -> None:
    given = {k: torch.zeros_like(v) for k, v in batch(0, 0).items()}
    with pytest.raises(InvalidArgument, match="no multiple of world_size=4"):
        ringfx.plan(WideModel(), (), given, world_size=4, shard_states=6)
