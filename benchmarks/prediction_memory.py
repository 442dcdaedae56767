"""Predicted against measured peak memory: ``python -m benchmarks.prediction_memory``.

Layers: one attention under each strategy, at p = 2 and 4. Models: whole training steps at p = 1
and 2, with and without the user's checkpointing, under each compiler. Measured is the largest sum
of the tensors that torch allocated above those that were there when the step began, from the
profiler's record of every allocation, on the worst rank, of a second step; predicted is the plan's.
Both are free of what the allocator keeps back, and do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import ringfx
from benchmarks.memory import _origin as origin
from ringfx.comm.process_group import Ranks
from ringfx.cost_model import load_profile, predict
from ringfx.cost_model.calibration.bench import admitted, bench_site, tensors_of
from ringfx.cost_model.calibration.on_ranks import Progress, on_ranks
from ringfx.cost_model.prediction.rank_share import local_share
from ringfx.ir.values import AttentionSite
from ringfx.ops.operator import attention
from ringfx.strategies import STRATEGIES
from ringfx.strategies.buffer_pool import POOL

RESULTS = Path(__file__).parent / "results" / "prediction_memory.json"
LIMITS = {"layer": 0.10, "model": 0.15}

LAYERS: Mapping[str, AttentionSite] = {
    "causal": bench_site(tokens=4000, heads=8, head_dim=64),
    "causal, grouped": bench_site(tokens=4000, heads=8, kv_heads=4, head_dim=64),
    "full": bench_site(tokens=3000, heads=4, head_dim=80, causal=False),
    "forward": bench_site(tokens=6000, heads=8, head_dim=64, train=False),
    "long, few heads": bench_site(tokens=12000, heads=4, kv_heads=4, head_dim=48, window=512),
    "bfloat16": bench_site(tokens=4000, heads=8, head_dim=64, dtype="bfloat16"),
    "batch of 2": bench_site(tokens=2000, heads=8, head_dim=64, batch=2),
}


def peak_bytes(step: Callable[[], object]) -> int:
    """Bytes allocated above the start, at most, from the profiler's record of every allocation.

    What is freed counts only where it was allocated here: of older blocks the profiler knows the
    size by chance, if it has seen their address before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    results: Any = found.profiler
    held: dict[int, int] = {}
    alive = peak = 0
    for event in sorted(_allocations(results), key=lambda e: e.start_time_ns):
        block = event.extra_fields
        if block.alloc_size > 0:
            held[block.ptr] = block.alloc_size
            alive += block.alloc_size
        else:
            alive -= held.pop(block.ptr, 0)
        peak = max(peak, alive)
    return peak


def _allocations(results: Any) -> list[Any]:
    roots = list(results.kineto_results.experimental_event_tree())
    found = []
    while roots:
        event = roots.pop()
        roots += event.children
        if event.typed[0] == _EventType.Allocation:
            found.append(event)
    return found


def _worst(value: int) -> int:
    shared = torch.tensor([value])
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared.item())


# --- one layer ------------------------------------------------------------------------------------


def _measure_layers(ranks: Ranks, device: str, progress: Progress, task: None) -> list[Any]:
    rows = []
    for name, site in LAYERS.items():
        for strategy in admitted(site, ranks.size):
            progress(f"{name}: {strategy}", len(rows), 4 * len(LAYERS))
            rows.append((name, strategy, _worst(_layer_peak(ranks, site, strategy, device))))
    return rows


def _layer_peak(ranks: Ranks, site: AttentionSite, strategy: str, device: str) -> int:
    tensors = tensors_of(site, ranks.size, device)
    assert ranks.group is not None, "there is a process group"

    def step() -> object:
        q, k, v = tensors
        out = attention(
            q, k, v, [], spec=site.spec.to_json(), strategy=strategy,
            layout=local_share(site, ranks.size).layout, group=str(ranks.group.group_name),
        )  # fmt: skip
        return torch.autograd.grad(out, tensors, out.detach()) if site.trains else out

    step()
    POOL.clear()
    dist.barrier()
    return peak_bytes(step)


def _layer_row(name: str, strategy: str, world_size: int, measured: int) -> dict[str, Any]:
    """Predicted: the output and its logsumexp, gradients handed over, and the workspace."""
    site = LAYERS[name]
    local = local_share(site, world_size)
    found = predict(
        site, STRATEGIES[strategy], world_size, load_profile("cpu-default", device="cpu")
    )
    handed = (local.q_items + local.kv_items) * local.itemsize
    made = local.out_items * local.itemsize + local.rows * local.accumulator_bytes
    predicted = made + found.workspace_bytes + (handed if site.trains else 0)
    return {
        "layer": name,
        "strategy": strategy,
        "ranks": world_size,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error": round(predicted / measured - 1, 4),
    }


# --- a whole model --------------------------------------------------------------------------------


class Plain(nn.Module):
    """A decoder in plain PyTorch: attention, a gated feed-forward, a vocabulary."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.checkpoint = False

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (4, -1)).transpose(1, 2)
            for y in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def _llama(width: int, layers: int, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model and how its step is run."""

    family: str
    width: int
    layers: int
    vocabulary: int
    tokens: int
    checkpoint: bool = False
    compiler: str = "aot_eager"
    optimizer: str = "none"

    def __str__(self) -> str:
        kept = ", checkpointed" if self.checkpoint else ""
        after = f", {self.optimizer}" if self.optimizer != "none" else ""
        return (
            f"{self.family} {self.layers} x {self.width}, vocabulary {self.vocabulary},"
            f" {self.tokens} tokens, {self.compiler}{kept}{after}"
        )


MODELS: Sequence[Setting] = [
    Setting(family=f, width=w, layers=n, vocabulary=v, tokens=t, checkpoint=c)
    for f, w, n, v, t, c in [
        ("plain", 128, 6, 512, 2048, False),
        ("plain", 128, 6, 512, 2048, True),
        ("plain", 64, 2, 8000, 1024, False),
        ("llama", 128, 4, 512, 2048, False),
        ("llama", 128, 6, 512, 2048, True),
        ("llama", 64, 2, 8000, 1024, False),
        ("llama", 256, 4, 256, 1024, False),
    ]
]


def _model(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    sizes = (setting.width, setting.layers, setting.vocabulary)
    if setting.family == "llama":
        model = _llama(*sizes)
        if setting.checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model
    plain = Plain(*sizes)
    plain.checkpoint = setting.checkpoint
    return plain


def _measure_model(
    ranks: Ranks, device: str, progress: Progress, setting: Setting
) -> tuple[int, str]:
    """The worst rank's bytes of the second step, and the plan."""
    torch.set_num_threads(1)
    model = _model(setting)
    optimized = ringfx.optimize(model, compiler=setting.compiler)
    ids = torch.randint(0, setting.vocabulary, (1, setting.tokens))
    dist.broadcast(ids, 0)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        found = optimized(ids, labels=ids)
        loss = found if isinstance(found, Tensor) else found.loss
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    POOL.clear()
    dist.barrier()
    return _worst(peak_bytes(step)), optimized.plan.to_json()


def _model_row(setting: Setting, world_size: int, measured: int, plan: str) -> dict[str, Any]:
    """Beyond the parameters, which were there before the step."""
    memory = ringfx.Plan.from_json(plan).memory
    there = sum(p.bytes for p in memory.parts if p.cause in ("parameters", "optimizer state"))
    predicted = memory.peak_bytes - there
    return {
        "model": str(setting),
        "ranks": world_size,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error": round(predicted / measured - 1, 4),
        "parts": {part.cause: part.bytes for part in memory.parts},
    }


# --- the report -----------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> dict[str, Any]:
    layers: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    if "layers" in options.what:
        for world_size in options.ranks_of_layers:
            found = on_ranks(
                _measure_layers, None, device="cpu", num_ranks=world_size, progress=_show
            )
            assert found is not None, "ranks are started here"
            layers += [_layer_row(n, s, world_size, measured) for n, s, measured in found]
    if "models" in options.what:
        for setting in _settings(options.compilers, options.only):
            for world_size in options.ranks_of_models:
                found = on_ranks(
                    _measure_model, setting, device="cpu", num_ranks=world_size, progress=_show
                )
                assert found is not None, "ranks are started here"
                models.append(_model_row(setting, world_size, *found))
                row = models[-1]
                print(f"{row['error']:+.1%} {row['model']} p={world_size}", flush=True)
    return {"layers": layers, "models": models}


def _settings(compilers: Iterable[str], only: str) -> list[Setting]:
    import dataclasses

    return [
        dataclasses.replace(s, compiler=name)
        for name in compilers
        for s in MODELS
        if only in str(s)
    ]


def _show(what: str, done: int, total: int) -> None:
    """Nothing: rows are printed as they come."""


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    errors = [abs(row["error"]) for row in rows]
    if not errors:
        return {}
    return {
        "figures": len(errors),
        "median": round(statistics.median(errors), 4),
        "worst": round(max(errors), 4),
    }


def main() -> int:
    """Prints and writes the rows; 1 where one is further off than the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", default=["layers", "models"])
    parser.add_argument("--compilers", nargs="+", default=["aot_eager", "inductor"])
    parser.add_argument("--ranks-of-layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ranks-of-models", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", help="models whose words contain this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = _run(options)
    summary = {name: _summary(rows) for name, rows in found.items()}
    for row in found["layers"]:
        print(f"{row['error']:+.1%} {row['layer']}, {row['strategy']}, {row['ranks']} ranks")
    print(summary)
    text = {"what": "predicted and measured peak memory", **origin(), "summary": summary, **found}
    options.output.write_text(json.dumps({**text, "limits": LIMITS}, indent=1) + "\n")
    worst = {name: row.get("worst", 0.0) for name, row in summary.items()}
    return int(worst["layers"] > LIMITS["layer"] or worst["models"] > LIMITS["model"])


if __name__ == "__main__":
    sys.exit(main())
