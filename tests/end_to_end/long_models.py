"""Models with hundreds of operators, operands or results in a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["LONG", "Conditions", "Steps", "phimoe", "phimoe_inputs", "states"]

Tensor = torch.Tensor
WIDTH, TIMES = 4, 500


def attend(x: Tensor, mask: Tensor | None = None) -> Tensor:
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q, mask, is_causal=mask is None).squeeze(1)


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, TIMES * WIDTH).view(TIMES, WIDTH))

    def terms(self, x: Tensor, n: int = TIMES) -> list[Tensor]:
        return [x * self.w[i] for i in range(n)]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(TIMES))

    def forward(self, x: Tensor) -> Tensor:
        x = attend(x)
        for layer in self.layers:
            x = x + layer(x).tanh() / TIMES
        return x


class Sum(Weighed):
    def forward(self, x: Tensor) -> Tensor:
        total = x = attend(x)
        for term in self.terms(x):
            total = total + term
        return total


class Joined(Weighed):
    def forward(self, x: Tensor) -> Tensor:
        x = attend(x)
        return torch.cat(self.terms(x), -1) + torch.stack(self.terms(x), -1).flatten(2)


class Results(Weighed):
    def forward(self, x: Tensor) -> list[Tensor]:
        return self.terms(attend(x), 300)


class Conditions(Weighed):
    """A mask of hundreds of conditions, of which few hold anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        distance = place[:, None] - place
        kept = distance >= 0
        for i in range(300):
            kept = kept & (distance != 3 + i)
        return attend(x * self.w[0], kept)


class Steps(Weighed):
    """A bias at the end of hundreds of steps from the distance."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], dtype=x.dtype)
        bias = (place[:, None] - place).abs()
        for i in range(300):
            bias = bias * 0.99 + 0.01 * (bias > i % 5)
        return attend(x * self.w[0], bias)


LONG = (Layers, Sum, Joined, Results, Conditions, Steps)


def states() -> tuple[Tensor]:
    return (torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(1)),)


def phimoe() -> nn.Module:
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        input_jitter_noise=0.01, router_jitter_noise=0.01, max_position_embeddings=64,
        use_cache=False,
    )  # fmt: skip
    model: nn.Module = PhimoeForCausalLM(config)
    return model.eval()


def phimoe_inputs() -> dict[str, Any]:
    ids = torch.randint(0, 32, (1, 11), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}
