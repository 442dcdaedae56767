"""Lightning, as ``recipes``: ``python -m tests.integrations.with_lightning FOLDER RANKS``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from tests.integrations.recipes import examples, model, sums


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = model()
        self.rows = SumMetric()
        self.seen: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.net(**batch).loss
        self.seen.append(self.trainer.strategy.reduce(loss.detach().clone()).item())
        self.log("loss", loss, sync_dist=True)
        self.log("rows", float(len(batch["labels"])), sync_dist=True, reduce_fx="sum")
        return loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, index: int) -> None:
        logits = self.net(**batch).logits
        right = (logits.argmax(-1)[:, :-1] == batch["labels"][:, 1:]).float().mean()
        self.log("right", right, sync_dist=True, batch_size=len(logits))
        self.rows(torch.tensor(float(len(logits))))
        self.log("tested", self.rows)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(**batch).logits.argmax(-1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained(folder: Path, ranks: int | None, devices: int, steps: int, **more: Any) -> Any:
    strategy: Any = "ddp"
    if ranks is not None:
        from ringfx.integrations.lightning import SequenceParallelStrategy

        strategy = SequenceParallelStrategy(sequence_ranks=ranks, compiler="eager")
    trainer = lightning.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, logger=False,
        accumulate_grad_batches=2, gradient_clip_val=0.1, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, precision="32-true",
        callbacks=[
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        ],
    )  # fmt: skip
    module = Module()
    loaders = DataLoader(examples(16), batch_size=2), DataLoader(examples(6, 50), batch_size=3)
    trainer.fit(module, *loaders, **more)
    return trainer, module, loaders[1]


def main(folder: Path, ranks: int | None, devices: int) -> None:
    torch.set_num_threads(1)
    trained(folder / "first", ranks, devices, 1)
    trainer, module, tests = trained(
        folder / "again", ranks, devices, 3, ckpt_path=str(folder / "first" / "step=1.ckpt")
    )
    assert type(module) is Module, "the user's own object stays what it was"
    metrics = {name: x.item() for name, x in trainer.callback_metrics.items()}
    predicted = [n for x in trainer.predict(module, tests) for n in x.flatten().tolist()]
    saved = Module.load_from_checkpoint(folder / "again" / "step=3.ckpt", weights_only=True)
    found: Mapping[str, Any] = {
        "losses": module.seen, **metrics, "predicted": predicted, **sums(module.net),
        **{f"saved {name}": x for name, x in sums(saved.net).items()},
    }  # fmt: skip
    rank = os.environ.get("RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) or None, int(os.environ.get("WORLD_SIZE", "1")))
