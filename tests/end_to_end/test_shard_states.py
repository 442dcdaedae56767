"""Parameters, gradients and optimizer state of which each rank holds its rows."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ringfx
from ringfx.comm.stats import snapshot
from ringfx.errors import InvalidArgument
from tests.models.wide import VOCABULARY, WideModel
from tests.support.harness import RankPool
from tests.support.ranks import error_text

STEPS = 3


def inputs(seq_len: int, seed: int = 1) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(VOCABULARY, (2, seq_len), generator=made) for _ in range(2))
    return {"tokens": tokens, "labels": labels}


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def mine(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def trained(
    model: nn.Module, call: nn.Module, seq_len: int, steps: int = STEPS
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """AdamW steps with clipped gradients: losses, norms, the last gradients, the parameters."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):  # gradients accumulate
            loss = call(**inputs(seq_len, 2 * step + part))
            loss.backward()
            found.append(loss.detach())
        found.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        last = [whole(p.grad) for p in model.parameters() if p.requires_grad]
        optimizer.step()
    return optimizer, [*found, *last, *(whole(p.detach()) for p in model.parameters())]


def model_of(kind: str) -> nn.Module:
    model = WideModel("smoothed", tied=kind == "tied").double()
    if kind == "frozen":
        for p in model.blocks.parameters():
            p.requires_grad_(False)
    return model


def difference(kind: str, compiler: Any, seq_len: int, chunks: Any) -> tuple[float, float, bool]:
    """How far three steps are from the unsplit model's; a rank's share of all states."""
    whole_model, model = model_of(kind), model_of(kind)
    _, expected = trained(whole_model, whole_model, seq_len)
    total = sum(p.numel() + (p.numel() * 3 if p.requires_grad else 0) for p in model.parameters())
    split = ringfx.optimize(model, shard_states=True, compiler=compiler, chunks=chunks)
    optimizer, found = trained(model, split, seq_len)
    states = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    held = sum(mine(x).numel() for x in (*model.parameters(), *grads, *states))
    worst = max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
        for a, b in zip(found, expected, strict=True)
    )
    same_names = [*split.state_dict()] == [*whole_model.state_dict()]
    return worst, held / total, same_names


@pytest.mark.parametrize("kind", ["plain", "tied", "frozen"])
def test_three_steps_are_those_of_the_unsplit_model(ranks2: RankPool, kind: str) -> None:
    chunks = 5 if kind == "tied" else "auto"
    for worst, share, same_names in ranks2.run(difference, kind, "aot_eager", 25, chunks):
        assert worst < 1e-9
        assert share <= 1.05 / 2
        assert same_names


def test_rows_that_do_not_divide_are_right_on_three_ranks(ranks3: RankPool) -> None:
    """257 rows of the vocabulary, 32 of others: ranks hold 86, 86, 85 and 11, 11, 10."""
    for worst, share, _ in ranks3.run(difference, "plain", "eager", 26, 4):
        assert worst < 1e-9
        assert share <= 1.05 / 3


@pytest.mark.slow
def test_compiled_by_inductor(ranks2: RankPool) -> None:
    for worst, *_ in ranks2.run(difference, "plain", "inductor", 25, 5):
        assert worst < 1e-9


def gathers() -> tuple[int, int]:
    """All-gathers outside attention of a forward, and of its backward."""
    split = ringfx.optimize(WideModel(), shard_states=True, compiler="aot_eager", strategy="simple")
    split(**inputs(16)).backward()
    ringfx.ops.reset_stats()
    loss = split(**inputs(16))
    forward = snapshot()["outside attention"].messages
    loss.backward()
    return forward, snapshot()["outside attention"].messages - forward


def test_what_was_gathered_is_gathered_again_in_backward(ranks2: RankPool) -> None:
    """One bucket: gathered once; in backward again, and its gradients are summed and cut."""
    assert ranks2.run(gathers) == [(1, 2), (1, 2)]


def saved(folder: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = WideModel()
    split = ringfx.optimize(model, shard_states=True, compiler="eager")
    optimizer, _ = trained(model, split, 24, steps=1)
    save({"model": split.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    return [whole(p.detach()) for p in model.parameters()]


def loaded(folder: str) -> list[Tensor]:
    """Into a model that is built on meta, of which only rows are ever made."""
    with torch.device("meta"):
        model = WideModel()
    split = ringfx.optimize(model, shard_states=True, compiler="eager")
    split.to_empty(device="cpu")
    assert all(mine(p).numel() <= p.numel() // 2 + p.shape[-1] for p in model.parameters())
    state = {"model": split.state_dict()}
    load(state, checkpoint_id=folder)
    split.load_state_dict(state["model"])
    split(**inputs(24)).backward()
    return [whole(p.detach()) for p in split.parameters()]


def test_what_four_ranks_save_two_ranks_load(ranks4: RankPool, ranks2: RankPool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = ranks4.run(saved, folder)[0]
        for after in ranks2.run(loaded, folder):
            for a, b in zip(before, after, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "momentum":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> list[Tensor]:
    for seed in seeds:
        optimizer.zero_grad()
        model(**inputs(24, seed)).backward()
        optimizer.step()
    return [whole(p.detach()) for p in model.parameters()]


def loaded_whole(kind: str) -> tuple[float, float]:
    """States of an unsplit run go on in a sharded one: how far apart, a rank's share of states."""
    alone, model = WideModel().double(), WideModel().double()
    before = optimizer_of(alone, kind)
    steps(alone, before, 1, 2)
    split = ringfx.optimize(model, shard_states=True, compiler="eager")
    after = optimizer_of(split, kind)
    split.load_state_dict(alone.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    expected, found = steps(alone, before, 3, 4), steps(split, after, 3, 4)
    worst = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    states = [x for state in after.state.values() for x in state.values() if x.dim()]
    held = [x.to_local() if isinstance(x, DTensor) else x for x in states]
    bytes_ = sum(x.untyped_storage().nbytes() for x in held)
    return worst, bytes_ / sum(x.numel() * x.itemsize for x in states)


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_an_optimizer_loads_a_whole_state(ranks2: RankPool, kind: str) -> None:
    for worst, share in ranks2.run(loaded_whole, kind):
        assert worst < 1e-12
        assert share < 0.52


def refused(what: str) -> str:
    model, options = WideModel(), {"shard_states": True}
    if what == "another cut":
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        given = distribute_tensor(model.head.weight, mesh, [Shard(1)])
        model.head.weight = nn.Parameter(given)
    optimizer = torch.optim.SGD(model.parameters()) if what == "an optimizer" else None
    try:
        ringfx.optimize(model, **options)  # type: ignore[arg-type]
    except InvalidArgument as error:
        return str(error)
    return f"nothing was refused; {optimizer}"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another cut", "head.weight (257, 32) is a DTensor already"),
        ("an optimizer", "make the optimizer after ringfx.optimize"),
    ],
)
def test_what_cannot_work_is_refused_by_name(ranks2: RankPool, what: str, words: str) -> None:
    for text in ranks2.run(refused, what):
        assert words in text


def test_it_needs_ranks() -> None:
    with pytest.raises(InvalidArgument, match="init_process_group"):
        ringfx.optimize(WideModel(), shard_states=True)


def test_the_plan_counts_rows(tmp_path: Path) -> None:
    peaks = []
    for sharded in (False, True):
        given = {k: torch.zeros_like(v) for k, v in inputs(64).items()}
        plan = ringfx.plan(
            WideModel(), (), given, world_size=4, optimizer="adamw", shard_states=sharded
        )
        parts = {p.cause: p.bytes for p in plan.memory.parts}
        peaks.append(parts)
    names = ("parameters", "optimizer state")
    assert sum(peaks[1][f"sharded {n}"] for n in names) <= 1.05 / 4 * sum(
        peaks[0][n] for n in names
    )
    assert "all_gather_states" in str(plan)


class Broken(nn.Module):
    """Parameters that are read by code which Dynamo leaves out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = WideModel(returns_logits=True), how
        self.weight = nn.Parameter(torch.linspace(0.5, 1, VOCABULARY * 4).view(VOCABULARY, 4))
        self.scale = nn.Parameter(torch.linspace(0.5, 1, VOCABULARY))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        loss, logits = self.inner(tokens, labels)
        if self.how == "handed over":
            more = summed(self.weight)
        elif self.how == "handed over beside a split value":
            more = scaled(logits, self.scale)
        else:
            more = self.uncompiled(logits)
        total: Tensor = loss + more
        return total

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def uncompiled(self, logits: Tensor) -> Tensor:
        if self.how == "walked over":
            return torch.stack([(p + 1).mean() for p in self.parameters()]).sum()
        if self.how == "written":
            with torch.no_grad():
                self.scale.clamp_(max=0.75)
        for column in range(4):  # the first reading is held by autograd, and used again
            logits = logits * self.scale * self.weight[:, column]
        return logits.mean() + (self.weight.t() @ torch.ones(VOCABULARY).to(logits)).sum()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def summed(weight: Tensor) -> Tensor:
    return (weight.t() @ torch.ones(VOCABULARY)).sum()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def scaled(logits: Tensor, scale: Tensor) -> Tensor:
    return (logits * scale).sum()


def read_uncompiled(compiler: Any, seq_len: int) -> list[str]:
    whole_model, model = Broken("").double(), Broken("").double()
    _, expected = trained(whole_model, whole_model, seq_len)
    split: Any = ringfx.optimize(model, shard_states=True, compiler=compiler)
    _, found = trained(model, split, seq_len)
    read = [c.name for c in split.plan.collectives if c.node == "python"]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    return read


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_parameter_that_uncompiled_code_reads_is_gathered(
    ranks3: RankPool, compiler: str
) -> None:
    for read in ranks3.run(read_uncompiled, compiler, 26):
        assert read.count("scale") == read.count("weight") == 1


def refused_uncompiled(how: str) -> str | None:
    split = ringfx.optimize(Broken(how), shard_states=True, compiler="eager", chunks="none")
    return error_text(split, **inputs(24))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("handed over", "Do: read it from its module there"),
        ("handed over beside a split value", "Do: read it from its module there"),
        ("walked over", "Do: read it from its module there"),
        ("written", "scale [257] is written by code that is not compiled"),
    ],
)
def test_what_uncompiled_code_cannot_do_with_a_parameter_is_an_error_by_name(
    ranks2: RankPool, how: str, words: str
) -> None:
    for text in ranks2.run(refused_uncompiled, how):
        assert text is not None
        assert text.startswith("CaptureRefused: ")
        assert words in text
