"""Small models and inputs, importable by name so that ranks can build them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = [
    "PlainTransformer",
    "llama",
    "padded_tokens",
    "plain",
    "shifted_loss",
    "tokens",
    "tokens_and_labels",
    "with_ignored_labels",
]


def llama(**sizes: Any) -> Callable[[], nn.Module]:
    """A factory of a two-layer Llama whose sizes all differ from each other by default."""
    return functools.partial(_llama, **sizes)


def _llama(**sizes: Any) -> nn.Module:
    chosen = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "use_cache": False,
        # The usual 0.02 makes attention so uniform that a wrong mask or scale hides in the noise.
        "initializer_range": 0.2,
    } | sizes
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**chosen))


def tokens(seq_len: int, batch: int = 1, vocab: int = 96, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (batch, seq_len), generator=generator)


def tokens_and_labels(
    seq_len: int, batch: int = 1, vocab: int = 96, seed: int = 3
) -> Callable[[], dict[str, torch.Tensor]]:
    return functools.partial(_tokens_and_labels, seq_len, batch, vocab, seed)


def _tokens_and_labels(seq_len: int, batch: int, vocab: int, seed: int) -> dict[str, torch.Tensor]:
    drawn = tokens(seq_len, batch, vocab, seed)
    return {"input_ids": drawn, "labels": drawn}


def with_ignored_labels(seq_len: int, batch: int = 2) -> Callable[[], dict[str, torch.Tensor]]:
    """Labels ignored unevenly: the ranks hold different numbers of tokens that count."""
    return functools.partial(_with_ignored_labels, seq_len, batch)


def _with_ignored_labels(seq_len: int, batch: int) -> dict[str, torch.Tensor]:
    drawn = tokens(seq_len, batch)
    labels = drawn.clone()
    labels[:, : seq_len // 3] = -100
    labels[0, seq_len // 2 : seq_len // 2 + 5] = -100
    return {"input_ids": drawn, "labels": labels}


def padded_tokens(
    seq_len: int, batch: int = 2, *, left: bool = False
) -> Callable[[], dict[str, torch.Tensor]]:
    """A padded batch with its attention mask; padding has no labels."""
    return functools.partial(_padded_tokens, seq_len, batch, left)


def _padded_tokens(seq_len: int, batch: int, left: bool) -> dict[str, torch.Tensor]:
    drawn = tokens(seq_len, batch)
    mask = torch.ones_like(drawn)
    for row in range(batch):
        padding = row * seq_len // 3  # over a shard's boundary in the second row
        if padding:
            mask[row, slice(None, padding) if left else slice(-padding, None)] = 0
    return {
        "input_ids": drawn,
        "attention_mask": mask,
        "labels": drawn.masked_fill(mask == 0, -100),
    }


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        nn.init.normal_(self.qkv.weight, std=0.2)  # sharp attention shows a wrong mask or scale
        self.out = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 2 * hidden),
            nn.GELU(),
            nn.Linear(2 * hidden, hidden),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq_len, hidden = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, seq_len, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq_len, hidden))
        result: torch.Tensor = x + self.mlp(x)
        return result


class PlainTransformer(nn.Module):
    """A transformer written in plain torch: learned positions, no mask tensor, no loss inside."""

    def __init__(
        self, *, vocab: int = 96, hidden: int = 48, heads: int = 4, causal: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(512, hidden)
        self.blocks = nn.ModuleList(_Block(hidden, heads, causal) for _ in range(2))
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        x = x + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return logits if labels is None else (shifted_loss(logits, labels), logits)


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, with the shift written as most people write it."""
    vocab = logits.shape[-1]
    return F.cross_entropy(logits[:, :-1].reshape(-1, vocab), labels[:, 1:].reshape(-1))


def plain(**sizes: Any) -> Callable[[], nn.Module]:
    return functools.partial(_plain, **sizes)


def _plain(**sizes: Any) -> nn.Module:
    torch.manual_seed(7)
    return PlainTransformer(**sizes)
