"""Stages ``product`` and ``large``: models split over several ranks on one GPU, and a large one.

NCCL refuses two ranks on one GPU; the ranks talk over tests/support/staged.py, through host memory.
Results are held against the unsplit model on the same device: in float32 to 1e-4, and under
bfloat16 autocast to twice the unsplit model's own distance from float64. ``large`` runs a Llama of
1B parameters at one rank, under NCCL where there is a GPU, and reports the allocator's peak.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.tensor import DTensor

import ringfx
from benchmarks.gpu.stage import Report, Setting, attempted, relative_error
from ringfx.split_tensor.tensor import SplitTensor
from tests.end_to_end.models import llama, plain, tokens
from tests.support import staged

__all__ = ["run", "run_large"]

TIMEOUT = datetime.timedelta(seconds=300)
RANK_S = 450

MODELS = {"plain": plain, "llama": llama}
RECIPES = ("float32", "autocast")
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "in chunks": {"chunks": 7},
    "sharded states": {"shard_states": True},
    "layers again": {"recompute": "attention"},
    "offloaded": {"recompute": "layers", "offload": "all"},
    "any length": {"dynamic": True},
}
"""Beside the strategies: wide parts in chunks with logits deferred; parameters cut into rows;
layers computed again in backward, their attention too; what layers that are computed again keep in
the host's memory; a program for a range of lengths."""
FLOAT32 = 1e-4
BFLOAT16 = 2**-7
"""Between two numbers of bfloat16 near 1."""
LEAST = 1e-3
"""Size of a gradient beside the largest below which it is all rounding."""


def run(setting: Setting) -> Report:
    report = Report(stage="product", setting=setting)
    for ranks in (2, 3):
        for row in _on_ranks(ranks, setting):
            report.add(row)
    return report


def _on_ranks(ranks: int, setting: Setting) -> list[dict[str, Any]]:
    """The rows of ``ranks`` processes on one device; the worst rank's where they differ."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        word = [setting.device, str(int(setting.small)), folder]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.product", *word],
                env=os.environ
                | {
                    "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0",
                },
            )
            for rank in range(ranks)
        ]  # fmt: skip
        deadline = time.monotonic() + RANK_S
        for process in processes:
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        found = [_rows_of(Path(folder, f"{rank}.json")) for rank in range(ranks)]
    rows = []
    for name in dict.fromkeys(name for by_name in found for name in by_name):
        each = [by_name.get(name, {"ok": False, "error": "no result"}) for by_name in found]
        worst = next((row for row in each if not row["ok"]), each[0])
        rows.append({"name": f"{ranks} ranks, {name}", **worst})
    if not rows:
        rows.append({"name": f"{ranks} ranks", "ok": False, "error": "the ranks gave no result"})
    return rows


def _rows_of(file: Path) -> dict[str, dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else {}


def rank_main(device: str, small: bool, folder: Path) -> None:
    """What one rank does: every model under every recipe and compiler."""
    torch.set_num_threads(1)
    staged.register()
    dist.init_process_group(staged.BACKEND, timeout=TIMEOUT)
    compilers = ("eager", "aot_eager") if small else ("eager", "inductor")
    strategies = ("production", "collective") if small else ("simple", "collective", "production")
    found: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        for recipe in RECIPES:
            for compiler in compilers:
                for strategy in strategies if compiler == "eager" else ("auto",):
                    label = f"{name}, {recipe}, {compiler}, {strategy}"
                    found[label] = attempted(
                        partial(_step, name, recipe, compiler, strategy, device)
                    )
                    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))
                for what, options in OPTIONS.items():
                    label = f"{name}, {recipe}, {compiler}, {what}"
                    found[label] = attempted(
                        partial(_step, name, recipe, compiler, "auto", device, options)
                    )
                    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _step(
    name: str,
    recipe: str,
    compiler: Any,
    strategy: Any,
    device: str,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = MODELS[name]()().to(device)
    exact, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    optimized: Any = ringfx.optimize(ours, strategy=strategy, compiler=compiler, **options)
    ids = tokens(61, 2).to(device)
    wanted = _results(exact, exact, ids, "float64")
    near = _results(stock, stock, ids, recipe)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = _results(optimized, ours, ids, recipe)
    wanted, near = ({k: _like(x, found[k]) for k, x in xs.items()} for xs in (wanted, near))
    found = {k: x.to_local() if isinstance(x, DTensor) else x for k, x in found.items()}
    errors = {k: relative_error(found[k], wanted[k]) for k in wanted}
    own = {k: relative_error(near[k], wanted[k]) for k in wanted}
    largest = max(float(x.norm()) for x in wanted.values())
    beyond = [
        k for k, x in wanted.items()
        if errors[k] > 2 * own[k] + _chance(x, recipe) * max(1.0, LEAST * largest / float(x.norm()))
    ]  # fmt: skip
    worst = max(errors, key=errors.__getitem__)
    row = {
        "ok": not beyond,
        "beyond": beyond[:3],
        "worst": worst,
        "error": errors[worst],
        "unsplit_error": own[worst],
        "strategies": sorted({layer.strategy for layer in optimized.plan.layers}),
    }
    if device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def _like(whole: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a gradient, where the other is cut into rows."""
    if not isinstance(found, DTensor):
        return whole
    rows = -(-whole.shape[0] // dist.get_world_size())
    return whole[dist.get_rank() * rows :][:rows]


def _chance(x: torch.Tensor, recipe: str) -> float:
    """What one rounding more may do; of a single number it may be all of it."""
    return FLOAT32 if recipe == "float32" else BFLOAT16 / (4 if x.numel() > 1 else 2)


def _results(
    call: nn.Module, owner: nn.Module, ids: torch.Tensor, recipe: str
) -> dict[str, torch.Tensor]:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=recipe == "autocast"):
        output = call(ids, labels=ids)
    loss = output[0] if isinstance(output, tuple) else output.loss
    if recipe != "float64" and call is not owner:
        logits = output[1] if isinstance(output, tuple) else output.logits
        assert isinstance(logits, SplitTensor), "nothing was split"
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in owner.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


# --- a large model on one rank --------------------------------------------------------------------


def run_large(setting: Setting) -> Report:
    report = Report(stage="large", setting=setting)
    for compiler in ("eager", "aot_eager" if setting.small else "inductor"):
        report.tried(f"Llama, one rank, {compiler}", partial(_large, compiler, setting))
    return report


def _large(compiler: Any, setting: Setting) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        if setting.small
        else {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    )
    config = LlamaConfig(
        vocab_size=1024 if setting.small else 128256,
        num_attention_heads=4 if setting.small else 32,
        num_key_value_heads=2 if setting.small else 8,
        max_position_embeddings=65536,
        **sizes,
    )
    if not dist.is_initialized():
        store = HashStore()
        dist.init_process_group(
            "nccl" if setting.is_cuda else "gloo", store=store, rank=0, world_size=1
        )
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device(setting.device):
        stock: nn.Module = nn.Module.to(LlamaForCausalLM(config), torch.bfloat16)
    length = 128 if setting.small else 8192
    ids = torch.randint(0, 1000, (1, length), device=setting.device)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in stock.parameters())}
    for name, model in {
        "unsplit": stock,
        "ringfx": ringfx.optimize(stock, compiler=compiler),
    }.items():
        for step in range(3):
            stock.zero_grad()
            if setting.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            if setting.is_cuda:
                torch.cuda.synchronize()
            row[f"{name} step {step} s"] = time.perf_counter() - began
        row[f"{name} loss"] = float(loss.detach())
        if setting.is_cuda:
            row[f"{name} peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    row["ok"] = abs(row["ringfx loss"] / row["unsplit loss"] - 1) < 1e-2
    return row


if __name__ == "__main__":
    rank_main(sys.argv[1], bool(int(sys.argv[2])), Path(sys.argv[3]))
