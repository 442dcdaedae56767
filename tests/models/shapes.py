"""Models of many shapes around the same small attention, importable by name for ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
HIDDEN, HEADS, VOCAB = 24, 3, 40


class Attention(nn.Module):
    """Self- or cross-attention on [B, S, E], written with SDPA."""

    def __init__(self, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=0.3)

    def forward(self, x: Tensor, memory: Tensor | None = None, **mask: Any) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, **mask)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    def __init__(self, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 40), nn.GELU(), nn.Linear(40, hidden)
        )

    def forward(self, x: Tensor, memory: Tensor | None = None, **mask: Any) -> Tensor:
        x = x + self.attention(self.norm(x), memory, **mask)
        result: Tensor = x + self.mlp(x)
        return result


class Base(nn.Module):
    """Embedding, two blocks, a head; subclasses say what happens between."""

    def __init__(self, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        self.first, self.second = Block(hidden, heads), Block(hidden, heads)
        self.head = nn.Linear(hidden, VOCAB)


class Causal(Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class Tied(Causal):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Frozen(Causal):
    def __init__(self) -> None:
        super().__init__()
        self.embed.requires_grad_(False)
        self.first.mlp.requires_grad_(False)
        self.second.attention.q.requires_grad_(False)


class FrozenBelow(Causal):
    """Only the head trains: the attention has no backward at all."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.head.requires_grad_(True)


class EncoderDecoder(Base):
    def __init__(self) -> None:
        super().__init__()
        self.cross = Block()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.first(self.embed(source))
        x = self.second(self.embed(target), is_causal=True)
        logits: Tensor = self.head(self.cross(x, memory))
        return logits


class FromEmbeddings(Base):
    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.second(self.first(embeddings, is_causal=True), is_causal=True)
        result: Tensor = x.tanh()
        return result


class SequenceFirst(Base):
    """[S, B, E] throughout, with attention over [B * heads, S, D]."""

    def attend(self, x: Tensor) -> Tensor:
        seq_len, batch, hidden = x.shape
        attention = self.first.attention
        q, k, v = (
            layer(x).reshape(seq_len, batch * HEADS, hidden // HEADS).transpose(0, 1)
            for layer in (attention.q, attention.k, attention.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = attention.out(mixed.transpose(0, 1).reshape(seq_len, batch, hidden))
        return result

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.t())
        logits: Tensor = self.head(x + self.attend(x))
        return logits


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder, sequence-first or batch-first, with a padding or a causal mask."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, 40, dropout=0.0, batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
        size = ids.shape[1] if self.encoder.layers[0].self_attn.batch_first else ids.shape[0]
        mask = nn.Transformer.generate_square_subsequent_mask(size) if causal else None
        if mask is not None:
            mask = mask.to(self.embed.weight.dtype)
        result: Tensor = self.encoder(
            self.embed(ids), mask=mask, src_key_padding_mask=padding, is_causal=causal
        )
        return result


class TorchTransformer(nn.Module):
    """nn.Transformer: encoder and decoder of different lengths, causal target."""

    def __init__(self, says_causal: bool | None = True) -> None:
        super().__init__()
        self.says_causal = says_causal
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.body = nn.Transformer(HIDDEN, HEADS, 1, 1, 40, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        size = target.shape[1]
        future = torch.ones(size, size, dtype=torch.bool).triu(1)
        result: Tensor = self.body(
            self.embed(source), self.embed(target), tgt_mask=future, tgt_is_causal=self.says_causal
        )
        return result


class Experts(Base):
    """Tokens sorted by expert, each run of them through its expert's weights, and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4)
        self.weights = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN) * 0.2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        flat = x.flatten(0, 1)
        scores, chosen = self.router(flat).softmax(-1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        rows = flat[order // 2]
        taken = torch.einsum("nd,nde->ne", rows, self.weights[chosen.flatten()[order]])
        mixed = torch.zeros_like(flat).index_add(
            0, order // 2, taken * scores.flatten()[order][:, None]
        )
        logits: Tensor = self.head(self.second(mixed.view_as(x), is_causal=True))
        return logits


class Pooled(Base):
    """A class token in front, attention without mask, mean, maximum and first token pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, HIDDEN))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        x = self.second(self.first(x))
        pooled = x.mean(1) + x.amax(1) + x[:, 0] + x[:, -3:].sum(1)
        logits: Tensor = self.head(pooled)
        return logits


class Axial(nn.Module):
    """Rows, then columns of a plane: two token axes in every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = Block(), Block()

    def forward(self, plane: Tensor) -> Tensor:
        batch, height, width, hidden = plane.shape
        x = self.rows(plane.reshape(batch * height, width, hidden), is_causal=True)
        x = x.view(batch, height, width, hidden).transpose(1, 2)
        x = self.columns(x.reshape(batch * width, height, hidden))
        result: Tensor = x.view(batch, width, height, hidden).transpose(1, 2)
        return result


class Latents(Base):
    """Learned queries read a long sequence, think among themselves, and are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(7, HIDDEN))
        self.write = Block()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        read = self.first(self.latents.expand(x.shape[0], -1, -1), x)
        logits: Tensor = self.head(self.write(x, self.second(read)))
        return logits


class Neighbours(Base):
    """Between two attentions what looks along tokens: convolution, cumsum, roll, sort, diff."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + x.cumsum(1) / x.shape[1] + x.roll(1, 1) + x.sort(1).values
        x = x + F.pad(x.diff(dim=1), (0, 0, 1, 0))
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class Shortened(Base):
    """The second attention runs on pairs of tokens merged into one, as U-shaped models do."""

    def __init__(self) -> None:
        super().__init__()
        self.merge, self.unmerge = nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        batch, seq_len, hidden = x.shape
        short = self.second(self.merge(x.reshape(batch, seq_len // 2, 2 * hidden)), is_causal=True)
        logits: Tensor = self.head(x + self.unmerge(short).reshape(batch, seq_len, hidden))
        return logits


class Gated(Base):
    """Reductions over tokens that come back to every token (squeeze-and-excite, normalisation)."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        gate = x.mean(1, keepdim=True).sigmoid() + x.logsumexp(1, keepdim=True)
        x = (x - x.mean((0, 1))) / (x.var(1, keepdim=True) + 1.0).sqrt() * gate
        weights = x.mean(-1).softmax(-1)
        x = x + torch.einsum("bs,bsd->bd", weights, x)[:, None]
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


@dataclass
class Answer:
    logits: Tensor
    hidden: list[Tensor]
    losses: dict[str, Tensor]


torch.utils._pytree.register_dataclass(Answer)


class Structured(Base):
    """Every hidden state and several losses, in a dataclass."""

    def forward(self, ids: Tensor) -> Answer:
        hidden = [self.embed(ids)]
        hidden.append(self.first(hidden[-1], is_causal=True))
        hidden.append(self.second(hidden[-1], is_causal=True))
        logits = self.head(hidden[-1])
        next_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return Answer(
            logits,
            hidden,
            {
                "next": next_token,
                "z": 1e-2 * logits.logsumexp(-1).square().mean(),
                "smooth": F.mse_loss(hidden[1][:, 1:], hidden[1][:, :-1]),
                "sum": F.l1_loss(hidden[2], hidden[0], reduction="sum"),
            },
        )


class Dictionary(Causal):
    """A dictionary, with one tensor given twice and one that is an input."""

    def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(ids)
        return {"logits": logits, "same": logits, "ids": ids, "none": None, "size": ids.shape[1]}


class Cropped(Base):
    """The second attention runs on a window of the first one's tokens."""

    def __init__(self, start: int, stop: int | None) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        logits: Tensor = self.head(self.second(x[:, self.start : self.stop], is_causal=True))
        return logits


class LastReads(Base):
    """The last tokens of a sequence read all of it."""

    def __init__(self, count: int, causal: bool = True) -> None:
        super().__init__()
        self.count, self.causal = count, causal

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=self.causal)
        logits: Tensor = self.head(self.second(x[:, -self.count :], x))
        return logits


class Memory(Base):
    """Learned keys in front of the tokens' own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, 3, HIDDEN))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        keys = torch.cat([self.memory.expand(x.shape[0], -1, -1), x], 1)
        logits: Tensor = self.head(self.second(x, keys))
        return logits


class Halves(Base):
    """Both halves of a sequence attend to themselves, by splitting and joining."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        left, right = x.chunk(2, 1)
        x = torch.cat([self.second(left, is_causal=True), self.second(right, left)], 1)
        logits: Tensor = self.head(x)
        return logits


class Blocked(Base):
    """Attention inside blocks of tokens: [B, S, E] viewed as [B * blocks, block, E]."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        batch, seq_len, hidden = x.shape
        inside = self.second(x.reshape(batch * 3, seq_len // 3, hidden), is_causal=True)
        logits: Tensor = self.head(inside.view(batch, seq_len, hidden))
        return logits


class Picks(Base):
    """Single tokens read by number, from both ends, and from a merged dimension."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        flat = x.flatten(0, 1)
        some = x[:, -1] + x[:, 0] + x[:, 3:4].squeeze(1) + flat[-2]
        x = self.second(x + some[:, None] + x[:, -2][:, None], is_causal=True)
        logits: Tensor = self.head(x)
        return logits


class Repeated(Base):
    """Tokens repeated, interleaved, reversed and strided between two attentions."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        x = x.repeat(1, 2, 1) + x.repeat_interleave(2, 1) + torch.cat([x, x.flip(1)], 1)
        x = self.second(x[:, ::2] + x[:, 1::2], is_causal=True)
        logits: Tensor = self.head(x)
        return logits
