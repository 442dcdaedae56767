"""Training loops of other libraries, to be started by torchrun or alone.

``python -m tests.integrations.recipes FOLDER RANKS [NAME ...]``: each rank writes what it saw into
FOLDER as ``rank0.json``: losses, metrics, and a sum of each parameter. RANKS share a sequence; 0:
nothing of ringfx is used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

TOKENS, EXAMPLES = 23, 14


def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        )
    )  # fmt: skip


def examples(count: int = EXAMPLES, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Some with less to predict, so that means over tokens and over examples differ."""
    found = []
    for i in range(count):
        ids = torch.randint(0, 64, (TOKENS,), generator=torch.Generator().manual_seed(seed + i))
        labels = ids.clone()
        labels[: 3 * (i % 5)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class Streamed(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Any:
        return iter(examples())


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder / "out"), "use_cpu": True, "max_steps": 4, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    return TrainingArguments(**{**options, **more})


def correct(given: Any) -> Mapping[str, float]:
    predicted, labels = given
    predicted = np.argmax(predicted, -1)[:, :-1]
    labels = labels[:, 1:]
    return {"rows": float(len(labels)), "right": float((predicted == labels).mean())}


def prepared(trainer: Trainer, ranks: int | None, **options: Any) -> Trainer:
    if ranks is None:
        return trainer
    from ringfx.integrations import transformers

    return transformers.prepare(trainer, sequence_ranks=ranks, compiler="eager", **options)


def logged(trainer: Trainer) -> Mapping[str, Any]:
    history = trainer.state.log_history
    return {
        "loss": [x["loss"] for x in history if "loss" in x],
        "norm": [x["grad_norm"] for x in history if "grad_norm" in x],
        **{
            name: x[name] for x in history for name in x if name.startswith("eval_")
            and not name.endswith(("runtime", "per_second"))
        },
        **sums(trainer.model),
    }  # fmt: skip


def sums(model: Any) -> Mapping[str, float]:
    found = {}
    for name, value in model.named_parameters():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = whole.detach().double().square().sum().item()
    return found


def trained(folder: Path, ranks: int | None, data: Any = None, **more: Any) -> Mapping[str, Any]:
    trainer = Trainer(model(), arguments(folder, **more), train_dataset=data or examples())
    prepared(trainer, ranks).train()
    return logged(trainer)


def plain(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    return trained(folder, ranks)


def accumulated(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    return trained(folder, ranks, gradient_accumulation_steps=3, max_grad_norm=0.1)


def by_device(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    """Means of each device's own tokens."""
    return trained(folder, ranks, average_tokens_across_devices=False)


def smoothed(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    return trained(folder, ranks, label_smoothing_factor=0.1, gradient_checkpointing=True)


def streamed(folder: Path, ranks: int | None, **more: Any) -> Mapping[str, Any]:
    """More steps than there are batches: the last is smaller, and begins anew."""
    return trained(folder, ranks, data=Streamed(), max_steps=9, **more)


def streamed_by_each(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    """Each process reads all and keeps its own."""
    return streamed(folder, ranks, accelerator_config={"dispatch_batches": False})


def streamed_evaluation(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    """A last batch of two, where others have three; nobody knows how many there are."""
    trainer = Trainer(
        model(), arguments(folder, eval_strategy="steps", eval_steps=2), train_dataset=examples(),
        eval_dataset=Streamed(), compute_metrics=correct,
    )  # fmt: skip
    prepared(trainer, ranks).train()
    return logged(trainer)


def evaluated(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    trainer = Trainer(
        model(), arguments(folder, eval_strategy="steps", eval_steps=2), train_dataset=examples(),
        eval_dataset=examples(7, seed=50), compute_metrics=correct,
    )  # fmt: skip
    prepared(trainer, ranks).train()
    return logged(trainer)


def made_anew(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    """``model_init`` makes the model that trains: another than the one that was prepared."""
    trainer = Trainer(
        args=arguments(folder, eval_strategy="steps", eval_steps=2), train_dataset=examples(),
        eval_dataset=examples(7, seed=50), model_init=lambda: model(),
    )  # fmt: skip
    prepared(trainer, ranks, **({} if ranks is None else {"shard_states": True})).train()
    if ranks is not None:
        assert trainer.model.plan.layers, "evaluated and saved by the split model"
    return logged(trainer)


def resumed(folder: Path, ranks: int | None, **options: Any) -> Mapping[str, Any]:
    """After two of four steps, in a new trainer; then loaded by its class alone."""
    given = arguments(folder, save_strategy="steps", save_steps=2)
    first = prepared(Trainer(model(), given, train_dataset=examples()), ranks, **options)
    first.train()
    again = prepared(Trainer(model(), given, train_dataset=examples()), ranks, **options)
    again.train(resume_from_checkpoint=f"{given.output_dir}/checkpoint-2")
    saved = LlamaForCausalLM.from_pretrained(f"{given.output_dir}/checkpoint-4")
    seen = logged(again)
    assert sums(first.model) == {name: seen[name] for name in sums(first.model)}
    return {**seen, **{f"saved {name}": x for name, x in sums(saved).items()}}


def resumed_with_sharded_states(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    return resumed(folder, ranks, **({} if ranks is None else {"shard_states": True}))


def accelerated(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if ranks is not None:
        from ringfx.integrations import accelerate

        accelerator = accelerate.prepare(accelerator, sequence_ranks=ranks, compiler="eager")
    own = model()
    loader, tests = DataLoader(examples(), batch_size=2), DataLoader(examples(7, 50), batch_size=3)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12)
    own, optimizer, loader, tests, scheduler = accelerator.prepare(
        own, optimizer, loader, tests, scheduler
    )
    losses, rates = [], []
    for batch in loader:
        with accelerator.accumulate(own):
            loss = own(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(own.parameters(), 0.1)  # of what is accumulated so far
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rates += scheduler.get_last_lr()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    rows, names = [], []
    with torch.no_grad():
        for batch in tests:
            logits = own(**batch).logits
            rows.append(accelerator.gather_for_metrics(logits.argmax(-1)))
            names += accelerator.gather_for_metrics([str(x.item()) for x in batch["labels"][:, -1]])
    accelerator.save_state(str(folder / "state"))
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder / "state"))
    total = accelerator.reduce(torch.tensor(2.0), "sum").item() / accelerator.num_processes
    found = accelerator.unwrap_model(own)
    return {
        "loss": losses, "rates": rates, "rows": torch.cat(rows).tolist(), "names": names,
        "total": total, **sums(found),
    }  # fmt: skip


def restored_with_sharded_states(folder: Path, ranks: int | None) -> Mapping[str, Any]:
    """accelerate's own saved state: whole, so that any number of ranks reads it."""
    from accelerate import Accelerator
    from safetensors.torch import load_file

    accelerator: Any = Accelerator(cpu=True)
    if ranks is not None:
        from ringfx.integrations import accelerate

        accelerator = accelerate.prepare(
            accelerator, sequence_ranks=ranks, compiler="eager", shard_states=True
        )
    given: Any = examples()
    own, loader = accelerator.prepare(model(), DataLoader(given, batch_size=2))
    optimizer = accelerator.prepare(torch.optim.AdamW(own.parameters(), lr=1e-2))
    batches, losses = [*loader], []

    def step(number: int) -> None:
        loss = own(**batches[number]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for number in (0, 1):
        step(number)
    accelerator.save_state(str(folder / "state"))
    for number in (2, 3):
        step(number)
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder / "state"))
    for number in (3, 4):
        step(number)
    saved = load_file(folder / "state" / "model.safetensors")
    whole = accelerator.get_state_dict(own)
    return {
        "loss": losses, **sums(own),
        **{f"whole {name}": x.square().sum().item() for name, x in whole.items()},
        **{f"saved {name}": x.square().sum().item() for name, x in saved.items()},
    }  # fmt: skip


RECIPES: Mapping[str, Callable[[Path, int | None], Mapping[str, Any]]] = {
    f.__name__: f
    for f in (
        plain, accumulated, by_device, smoothed, streamed, streamed_by_each, streamed_evaluation,
        evaluated, made_anew, resumed, resumed_with_sharded_states, accelerated,
        restored_with_sharded_states,
    )
}  # fmt: skip


def main(folder: Path, ranks: int | None, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in names:
        here = folder / name
        here.mkdir(exist_ok=True)
        found[name] = RECIPES[name](here, ranks)
    rank = os.environ.get("RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    shared = int(sys.argv[2])
    main(Path(sys.argv[1]), shared or None, sys.argv[3:] or [*RECIPES])
