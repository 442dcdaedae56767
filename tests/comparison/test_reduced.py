"""Models made small by themselves: which layers, tokens and widths stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ringfx.comparison.reduced import LONGEST, reduced
from tests.comparison.models import Block, Decoder, ids


class Kinds(nn.Module):
    """Every third layer has another window; each holds experts, which are no layers."""

    def __init__(self, counted: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(Block(window=8 if i % 3 == 2 else 0) for i in range(6))
        for i, block in enumerate(self.blocks):
            block.layer_idx = i  # type: ignore[assignment]
            block.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.counted = counted

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        for i in range(6) if self.counted else range(len(self.blocks)):
            block: Any = self.blocks[i]
            x = block.experts[3](block(x))
        return x


def test_a_layer_of_each_kind_stays_with_its_weights() -> None:
    model = Kinds()
    small = reduced(model, (ids(),), {})
    blocks: Any = small.model.get_submodule("blocks")
    assert [b.window for b in blocks] == [0, 8]
    assert [b.layer_idx for b in blocks] == [0, 1]
    assert [len(b.experts) for b in blocks] == [4, 4]
    assert torch.equal(blocks[1].qkv.weight, model.blocks[2].qkv.weight)  # type: ignore[union-attr, arg-type]
    assert len(model.blocks) == 6
    assert small.notes == ("blocks: 6 layers -> 2 (numbers 0, 2)",)


def test_two_of_one_kind_stay() -> None:
    small = reduced(Decoder(layers=5), (ids(),), {})
    assert len(small.model.get_submodule("layers")) == 2  # type: ignore[arg-type]


def test_layers_that_the_code_counts_on_stay() -> None:
    small = reduced(Kinds(counted=True), (ids(),), {})
    assert len(small.model.get_submodule("blocks")) == 6  # type: ignore[arg-type]
    assert small.notes == ()


def test_tokens_are_cut_where_the_model_runs_with_fewer() -> None:
    small = reduced(Decoder(), (ids(1000),), {})
    assert small.args[0].shape == (1, LONGEST)
    assert small.notes == (f"1,000 tokens -> {LONGEST}",)

    class Fixed(Decoder):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            assert input_ids.shape[1] == 300
            return super().forward(input_ids)

    kept = reduced(Fixed(), (ids(300),), {})
    assert kept.args[0].shape == (1, 300)
    assert kept.notes == ("its length stays: the model does not run with a shorter one",)


def test_a_model_on_meta_gets_weights_and_its_inputs_values() -> None:
    with torch.device("meta"):
        model, given = Decoder(), torch.zeros(1, 30, dtype=torch.int64)
    small = reduced(model, (given,), {})
    logits = small.model(*small.args)
    assert logits.isfinite().all()
    assert small.args[0].unique().numel() > 5
    assert "on the meta device" in small.notes[0]


def test_a_large_configuration_gets_narrow_and_its_heads_stay() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=32, vocab_size=128256, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        given = torch.zeros(1, 8192, dtype=torch.int64)
    small = reduced(model, (), {"input_ids": given, "labels": given})
    layers: Any = small.model.get_submodule("model.layers")
    assert len(layers) == 2
    assert layers[0].self_attn.head_dim == 128
    assert layers[0].self_attn.q_proj.out_features == 4 * layers[0].self_attn.k_proj.out_features
    assert sum(p.numel() for p in small.model.parameters()) < 30_000_000
    assert small.kwargs["input_ids"].max() < small.model.config.vocab_size  # type: ignore[union-attr]
    text = "\n".join(small.notes)
    assert "model.layers: 32 layers -> 2" in text
    assert "hidden_size 4096 -> 1024" in text
    assert "8,192 tokens -> 250" in text
    assert "weights drawn at random" in text
