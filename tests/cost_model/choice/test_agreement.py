"""Every way to a figure gives the same: plans of Hugging Face models, fresh, changed and saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import ringfx
from ringfx.api import offline
from ringfx.cli.main import app
from ringfx.cost_model.choice.whatif import Change, longest_sequence, replan, sweep
from ringfx.errors import OutOfMemory
from ringfx.ir.plan import Plan
from tests.cost_model.sites import shipped

CPU = shipped("cpu-default")

Made = tuple[torch.nn.Module, dict[str, torch.Tensor]]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "intermediate_size": 96, "max_position_embeddings": 8192,
}  # fmt: skip


def _tokens(length: int) -> dict[str, torch.Tensor]:
    tokens = torch.empty(1, length, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}


def _gpt2(length: int) -> Made:
    dropouts = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = hf.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=8192, bos_token_id=0,
        eos_token_id=0, **dropouts,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config), _tokens(length)


def _dense_mask(length: int) -> Made:
    """An additive mask that the user gives: an entry for each query and key."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2))
    return model, {**_tokens(length), "attention_mask": torch.empty(1, 1, length, length)}


def _experts(length: int) -> Made:
    config = hf.MixtralConfig(**SIZES, num_local_experts=4, num_key_value_heads=2)
    return hf.MixtralForCausalLM(config), _tokens(length)


def _encoder(length: int) -> Made:
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES, **dropouts)), _tokens(length)


def _fresh(make: Callable[[int], Made], tokens: int, ranks: int, **options: Any) -> Plan:
    with offline():
        model, inputs = make(tokens)
    return ringfx.plan(
        model, kwargs=inputs, world_size=ranks, profile=CPU.name, on_unsupported="gather", **options
    )


def _by_command(saved: Path, *words: str) -> str:
    result = CliRunner().invoke(app, ["plan", str(saved), *words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("make", [_gpt2, _dense_mask, _experts, _encoder])
def test_fresh_changed_swept_and_saved_plans_agree(
    make: Callable[[int], Made], tmp_path: Path
) -> None:
    here, there = _fresh(make, 1024, 2), _fresh(make, 4096, 3)
    saved = tmp_path / "plan.json"
    saved.write_text(here.to_json())
    assert json.loads(_by_command(saved, "--json")) == json.loads(here.to_json())

    change = Change(seq_len=4096, world_size=3)
    changed = replan(here, change, CPU)
    assert changed.memory.peak_bytes == pytest.approx(there.memory.peak_bytes, rel=0.003)
    assert [x.strategy for x in changed.layers] == [x.strategy for x in there.layers]
    assert sweep(here, [change], CPU) == (changed,)
    asked = _by_command(saved, "--what-if", "seq-len=4096,world-size=3", "--json")
    assert Plan.from_json(asked).memory == changed.memory

    budget = there.memory.peak_bytes
    long = replan(here, Change(world_size=3, gpu_memory=budget), CPU)
    longest = longest_sequence(long, CPU)
    assert longest >= 0.99 * 4096  # and more, where the fastest choice is not the least one
    saved.write_text(long.to_json())
    assert f"{longest:,} tokens" in _by_command(saved, "--max-seq-len")
    assert replan(long, Change(seq_len=longest), CPU).memory.peak_bytes <= budget
    with pytest.raises(OutOfMemory):
        replan(long, Change(seq_len=longest + 64), CPU)


def test_the_longest_sequence_of_a_model_is_a_fresh_plans(tmp_path: Path) -> None:
    """From a length that does not fit, with chunks that this length alone would not have."""
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(config.to_json_string())
    asked = [str(tmp_path / "config.json"), "--world-size", "2", "--gpu-memory", "24MiB"]
    found = CliRunner().invoke(app, ["plan", *asked, "--seq-len", "64k", "--max-seq-len"])
    assert found.exit_code == 0, found.output
    longest = int(found.stdout.split()[-2].replace(",", ""))
    assert 1_000 < longest < 65_536
    for length, fits in ((longest, True), (longest + longest // 100, False)):
        planned = CliRunner().invoke(app, ["plan", *asked, "--seq-len", str(length)])
        assert (planned.exit_code == 0) == fits, planned.output
