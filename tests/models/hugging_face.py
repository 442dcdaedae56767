"""Small Hugging Face models that spell attention out (attn_implementation="eager")."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor
VOCAB = 96
HEADS: Mapping[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
EAGER: Mapping[str, Any] = {
    "use_cache": False, "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**HEADS, **EAGER, **more}))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, **no_dropout, **EAGER)
    return GPT2LMHeadModel(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, dropout_rate=0.0, **sizes, **EAGER)
    )


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(head_dim=12, sliding_window=5, **HEADS, **EAGER))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"head_dim": 12, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}
    return GptOssForCausalLM(GptOssConfig(**sizes, **HEADS, **EAGER))


def ids(seq_len: int, batch: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, seq_len), generator=generator)


def _tokens(seq_len: int, padded: bool) -> dict[str, Tensor]:
    found = {"input_ids": ids(seq_len)}
    if padded:
        kept = torch.ones(2, seq_len, dtype=torch.int64)
        kept[0, :4] = kept[1, -3:] = 0
        found["attention_mask"] = kept
    return found


def tokens(seq_len: int, padded: bool = False) -> Callable[[], dict[str, Tensor]]:
    return functools.partial(_tokens, seq_len, padded)


def _two(source: int, target: int) -> dict[str, Tensor]:
    return {"input_ids": ids(source), "decoder_input_ids": ids(target, seed=4)}


def source_and_target(source: int, target: int) -> Callable[[], dict[str, Tensor]]:
    return functools.partial(_two, source, target)


def square_of_logits(output: Any) -> Tensor:
    mean: Tensor = output.logits.square().mean()
    return mean
