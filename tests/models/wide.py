"""Causal models with wide parts: gated MLPs, a vocabulary, and losses in many spellings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LOSSES", "SEVERAL_NUMBERS", "WideModel"]

VOCABULARY = 257


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gate, self.up = nn.Linear(dim, 4 * dim), nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, S, D))
        y = self.norms[1](x)
        wide: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + wide


def hugging_face(z: Tensor, labels: Tensor) -> Tensor:
    """A float32 copy of the logits, and labels that are moved by one."""
    wide = z if z.dtype == torch.float64 else z.float()
    moved = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(wide.view(-1, wide.shape[-1]), moved.view(-1), ignore_index=-100)


def sliced(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].reshape(-1, z.shape[-1]), labels[:, 1:].reshape(-1))


def smoothed(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, z.shape[-1]), labels.view(-1), label_smoothing=0.1)


def ignoring(z: Tensor, labels: Tensor) -> Tensor:
    labels = labels.masked_fill(labels < VOCABULARY // 3, -7)
    return F.cross_entropy(z.view(-1, z.shape[-1]), labels.view(-1), ignore_index=-7)


def weighted(z: Tensor, labels: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, z.shape[-1], dtype=z.dtype, device=z.device)
    return F.cross_entropy(z.view(-1, z.shape[-1]), labels.view(-1), weight=weights)


def capped(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((torch.tanh(z / 30) * 30).view(-1, z.shape[-1]), labels.view(-1))


def classes_first(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), labels)


def with_z_loss(z: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(z.view(-1, z.shape[-1]), labels.view(-1))
    return loss + 1e-2 * (z.logsumexp(-1) ** 2).mean()


def by_hand(z: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities picked and averaged under a mask."""
    picked = z.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    kept = (labels % 5 != 3).to(z.dtype)
    return -(picked * kept).sum() / kept.sum()


def summed(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, z.shape[-1]), labels.view(-1), reduction="sum")


def of_each_example(z: Tensor, labels: Tensor) -> Tensor:
    """A sum over the tokens of each example, of which one counts more."""
    losses = F.cross_entropy(z.transpose(1, 2), labels, reduction="none").sum(1)
    return (losses * torch.tensor([1.0, 2.5], dtype=z.dtype)).mean()


def pooled(z: Tensor, labels: Tensor) -> Tensor:
    """The wide values themselves are averaged over the tokens."""
    return F.cross_entropy(torch.tanh(z).mean(1), labels[:, 0])


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hugging face": hugging_face,
    "sliced": sliced,
    "smoothed": smoothed,
    "ignoring": ignoring,
    "weighted": weighted,
    "capped": capped,
    "classes first": classes_first,
    "z-loss": with_z_loss,
    "by hand": by_hand,
    "summed": summed,
    "of each example": of_each_example,
    "pooled": pooled,
}
SEVERAL_NUMBERS = frozenset(["z-loss", "of each example", "pooled"])
"""Losses of which the wide part leaves more than one number."""


class WideModel(nn.Module):
    """Gives the loss, and the logits too if ``returns_logits``."""

    def __init__(
        self, loss: str = "hugging face", *, tied: bool = False, returns_logits: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        dim = 32
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.Sequential(*(Block(dim, 4) for _ in range(2)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.loss, self.returns_logits = LOSSES[loss], returns_logits

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        z = self.head(self.norm(self.blocks(self.embed(tokens))))
        loss = self.loss(z, labels)
        return (loss, z) if self.returns_logits else loss
