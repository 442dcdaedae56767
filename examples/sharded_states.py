"""Training with parameters, gradients and optimizer state sharded over the ranks.

    python -m examples.sharded_states                                           one rank
    torchrun --nproc-per-node 2 -m examples.sharded_states                      a sequence over two
    torchrun --nproc-per-node 4 -m examples.sharded_states --replicas 2         two such sequences

Each sequence is split over ``cp`` ranks, ``dp_shard`` sequences are computed at once, and every
rank holds its rows of the states over all of them, as torchtitan and accelerate lay out a mesh.
``--folder`` saves the model and its optimizer after the last step with torch's distributed
checkpoint, and goes on from there in the next run, on any number of ranks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import ringfx
from examples.train import batch, config


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # every rank starts from the same weights
    model = LlamaForCausalLM(config())
    replica = 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        shape = (options.replicas, dist.get_world_size() // options.replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_shard", "cp"))
        replica = mesh.get_local_rank("dp_shard")
        model = ringfx.optimize(
            model, mesh=mesh["cp"], shard_states=mesh["dp_shard", "cp"], compiler=options.compiler
        )
    first = not dist.is_initialized() or dist.get_rank() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after optimize
    start = _load(model, optimizer, options.folder)
    for step in range(start, start + options.steps):
        tokens = batch(step * options.replicas + replica, options.seq_len)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = _whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if first:
            print(f"step {step}: loss {loss.item():.6f}, gradient norm {norm.item():.6f}")
    if first:
        print(f"states on this rank: {_bytes_of_states(model, optimizer) / 2**20:.1f} MiB")
    _save(model, optimizer, options.folder, start + options.steps)
    if dist.is_initialized():
        dist.destroy_process_group()


def _load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None) -> int:
    """The step to go on with: 0 where nothing is saved."""
    if folder is None or not (folder / ".metadata").exists():
        return 0
    weights, state = get_state_dict(model, optimizer)
    found: dict[str, Any] = {"model": weights, "optimizer": state, "step": 0}
    load(found, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
    return int(found["step"])


def _save(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None, step: int
) -> None:
    if folder is not None:
        weights, state = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=folder)


def _bytes_of_states(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of parameters and the optimizer."""
    states = [x for each in optimizer.state.values() for x in each.values()]
    return sum(_mine(x).nbytes for x in (*model.parameters(), *states))


def _mine(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.sharded_states")
    parser.add_argument("--replicas", type=int, default=1, help="sequences computed at once")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of the checkpoint")
    parser.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    return parser.parse_args()


if __name__ == "__main__":
    main()
