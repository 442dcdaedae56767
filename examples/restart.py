"""A rank is killed in the middle of training; torchrun starts all again, from the last checkpoint.

    torchrun --nproc-per-node 2 --max-restarts 1 -m examples.restart --folder /tmp/run --kill

With ``--kill`` the last rank of the first start ends itself by SIGKILL before its fourth step. The
others do not wait for it: they end with its name, and the launcher starts all of them again.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import LlamaConfig, LlamaForCausalLM

import ringfx

STEPS, KILLED_BEFORE = 6, 3


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m examples.restart")
    options.add_argument("--folder", type=Path, required=True, help="of the checkpoints")
    options.add_argument("--kill", action="store_true")
    options.add_argument("--compiler", default="inductor", help="inductor, aot_eager or eager")
    given = options.parse_args()
    _join()
    last = dist.get_rank() == dist.get_world_size() - 1
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = ringfx.optimize(LlamaForCausalLM(config), shard_states=True, compiler=given.compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = (torch.arange(301) * 7 % 251)[None]
    start, folder = 0, _latest(given.folder)
    if folder is not None:
        found = _state(model, optimizer, 0)
        load(found, checkpoint_id=folder)
        set_state_dict(
            model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
        )
        start = found["step"]
    for step in range(start, STEPS):
        if given.kill and first_start and last and step == KILLED_BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        save(_state(model, optimizer, step + 1), checkpoint_id=given.folder / f"{step + 1:06}")
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


def _join() -> None:
    """``init_process_group("gloo")``; but in torch 2.13 gloo then looks for old ranks."""
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "gloo", store=PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store),
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
    )  # fmt: skip


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "step": step}


def _latest(folder: Path) -> Path | None:
    """The newest checkpoint that is complete: its metadata is written last."""
    return max((file.parent for file in folder.glob("*/.metadata")), default=None)


if __name__ == "__main__":
    main()
