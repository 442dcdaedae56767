"""What the integrations cannot do is an error at once, with the line to write."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

import ringfx
from ringfx.compile.optimized import Optimized
from ringfx.errors import InvalidArgument
from tests.integrations.recipes import arguments, examples, model

accelerated = ringfx.integrations.accelerate
trained = ringfx.integrations.transformers


def accelerator(**options: Any) -> Any:
    return Accelerator(cpu=True, **options)


def test_what_is_no_accelerator_and_no_trainer() -> None:
    with pytest.raises(InvalidArgument, match=r"must be an accelerate\.Accelerator, not Linear"):
        accelerated.prepare(cast(Any, nn.Linear(1, 1)))
    with pytest.raises(InvalidArgument, match=r"must be a transformers\.Trainer, not Linear"):
        trained.prepare(cast(Any, nn.Linear(1, 1)))


def test_twice() -> None:
    once = accelerated.prepare(accelerator())
    with pytest.raises(InvalidArgument, match="already prepared"):
        accelerated.prepare(once)


def test_batches_that_are_sent_in_parts() -> None:
    from accelerate.utils import DataLoaderConfiguration

    given = accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    with pytest.raises(InvalidArgument, match="dispatch_batches=True sends each rank its own part"):
        accelerated.prepare(given)


def test_loaders_that_count_by_ranks() -> None:
    given = accelerator()
    given.dataloader_config.use_stateful_dataloader = True
    with pytest.raises(InvalidArgument, match=r"resume with accelerator\.skip_first_batches"):
        accelerated.prepare(given)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("parallelism_config", SimpleNamespace(cp_size=2), "cp_size=2, which splits sequences"),
        ("parallelism_config", SimpleNamespace(tp_size=4), "tp_size=4, which splits"),
        ("fsdp_plugin", object(), "has a fsdp_plugin, which shards states by itself"),
    ],
)
def test_other_ways_to_split_or_shard(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, words: str
) -> None:
    given = accelerator()
    monkeypatch.setitem(given.state.__dict__, name, value)
    with pytest.raises(InvalidArgument, match=words):
        accelerated.prepare(given)


def test_a_model_that_was_optimized_before_stays() -> None:
    given = ringfx.optimize(model(), compiler="eager")
    found = accelerated.prepare(accelerator(), strategy="simple").prepare_model(given)
    assert isinstance(found, Optimized)
    assert found is given


def test_an_optimizer_of_a_model_that_is_about_to_be_sharded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In words of what was called: accelerate's order, and the Trainer's arguments."""
    own, optimizer = model(), torch.optim.SGD
    made = optimizer(own.parameters(), lr=0.1)
    given = accelerated.prepare(accelerator(), shard_states=True)
    trainer = Trainer(
        own, arguments(tmp_path), train_dataset=examples(), optimizers=(made, None)
    )  # fmt: skip
    for state in (given.state, trainer.accelerator.state):
        monkeypatch.setitem(state.__dict__, "num_processes", 2)
    with pytest.raises(InvalidArgument, match=r"call model = accelerator\.prepare\(model\) first"):
        given.prepare(own, made)
    with pytest.raises(InvalidArgument, match="pass optimizer_cls_and_kwargs="):
        trained.prepare(trainer, shard_states=True)
