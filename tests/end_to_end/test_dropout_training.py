"""BERT and GPT-2 fine-tuned with their default dropouts learn as fast on two ranks as unsplit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import ringfx
from tests.support.harness import RankPool

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

STEPS, SEEDS, VOCABULARY = 50, range(6), 48


def bert(attention: str) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": VOCABULARY, "num_attention_heads": 4, "attn_implementation": attention}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes))


def gpt2(attention: str) -> nn.Module:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": attention}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))


MODELS = {"bert": bert, "gpt2": gpt2}


def batch() -> dict[str, Tensor]:
    """Sequences to learn by heart, one shorter than the other."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (4, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 19:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def curves(name: str, attention: str, split: bool) -> Tensor:
    """Losses, [seeds, steps]: the same weights and data, other numbers drawn."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name](attention).train()
    start = {n: x.clone() for n, x in model.state_dict().items()}
    called = ringfx.optimize(model, compiler="aot_eager") if split else model
    found = []
    for seed in SEEDS:
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        torch.manual_seed(100 * seed + split)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = called(**batch()).loss
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return torch.stack(found).view(len(SEEDS), STEPS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_learns_as_fast(ranks2: RankPool, name: str, attention: str) -> None:
    whole = curves(name, attention, split=False)
    first, second = ranks2.run(curves, name, attention, True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert float(whole[:, -5:].mean()) < 0.8 * float(whole[:, 0].mean()), "it learns"
    for steps in (slice(0, 1), slice(5, 20), slice(20, 35), slice(35, 50)):
        ours, theirs = first[:, steps].mean(1), whole[:, steps].mean(1)
        error = math.sqrt(float(ours.var() + theirs.var()) / len(SEEDS))
        distance = float(ours.mean() - theirs.mean()) / error
        print(name, attention, steps, float(ours.mean()), float(theirs.mean()), distance)
        assert abs(distance) < 4.0, "standard errors over seeds"
