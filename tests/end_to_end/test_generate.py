"""generate() on an optimized model: the unsplit model's tokens, whatever keeps its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers

import ringfx
from ringfx.split_tensor.tensor import SplitTensor
from tests.support.harness import RankPool
from tests.support.recorded import recorded

pytestmark = pytest.mark.ranks

SIZES: Mapping[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
GPT2: Mapping[str, Any] = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
T5: Mapping[str, Any] = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "mistral": ("MistralForCausalLM", {**SIZES, "sliding_window": 6}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "t5": ("T5ForConditionalGeneration", T5),
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


def model_of(name: str) -> Any:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model_class: Any = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that the tokens differ
    return model


def prompt(seq_len: int = 11) -> torch.Tensor:
    return torch.randint(3, 97, (2, seq_len), generator=torch.Generator().manual_seed(1))


def generated(
    jobs: Sequence[tuple[str, str]], count: int
) -> list[tuple[str, list[Any], list[Any]]]:
    """The tokens of the optimized model and of the stock one."""
    found = []
    for name, way in jobs:
        torch._dynamo.reset()
        model = model_of(name)
        asked = {**WAYS[way], "max_new_tokens": count, "min_new_tokens": count}
        tokens = []
        for one in (ringfx.optimize(model, compiler="eager"), model):
            torch.manual_seed(5)
            tokens.append(one.generate(prompt(), **asked).tolist())
        found.append((f"{name}, {way}", tokens[0], tokens[1]))
    return found


def test_a_prompt_and_what_follows_it_token_by_token(ranks2: RankPool) -> None:
    for rank in ranks2.run(generated, [("mistral", "greedy")], 3):
        for name, ours, expected in rank:
            assert ours == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_gives_the_unsplit_models_tokens(
    way: str, ranks3: RankPool
) -> None:
    jobs = [(name, way) for name in MODELS if (name, way) != ("t5", "static cache")]
    for rank in ranks3.run(generated, jobs, 3):
        for name, ours, expected in rank:
            assert ours == expected, name


def bytes_of_a_cached_call() -> tuple[int, int, int]:
    """Bytes sent by a call with its cache untouched, by one without, and bytes of the cache."""
    model = ringfx.optimize(model_of("llama"), compiler="eager")
    sent = []
    for use_cache in (True, False):
        with torch.no_grad():
            model(prompt(), use_cache=use_cache)  # compiles, and compares parameters once
            with recorded() as messages:
                output = model(prompt(), use_cache=use_cache)
                sent.append(sum(m.num_bytes for m in messages))
        if use_cache:
            layers = output.past_key_values.layers
            kept = [t for layer in layers for t in (layer.keys, layer.values)]
    assert all(isinstance(t, SplitTensor) and t._whole is None for t in kept)
    return sent[0], sent[1], sum(t.numel() * t.element_size() for t in kept)


def test_a_cache_that_nobody_reads_is_never_gathered(ranks2: RankPool) -> None:
    for cached, plain, size in ranks2.run(bytes_of_a_cached_call):
        assert cached == plain
        assert size > 0
