"""Models in whose forward Dynamo ends a program while values are split."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models.shapes import HEADS, HIDDEN, VOCAB, Base, Block, Causal, FromEmbeddings

Tensor = torch.Tensor


class Branching(Causal):
    """Goes one way or another by what it sees."""

    causal = True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=self.causal)
        x = x * 2 if float(x.detach().sum()) > 1e9 else x / 2
        x = self.second(x, is_causal=self.causal)
        if float(x.detach().sum()) > 1e9:
            x = -x
        logits: Tensor = self.head(x)
        return logits


class Contiguous(Branching):
    causal = False


class TiedAcross(Branching):
    """One weight in the first program and in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class BrokenBlock(Block):
    """Breaks between its attention and its residual, which therefore crosses too."""

    def forward(self, x: Tensor, memory: Tensor | None = None, **mask: Any) -> Tensor:
        y = self.attention(self.norm(x), memory, **mask)
        torch._dynamo.graph_break()
        x = x + y
        out: Tensor = x + self.mlp(x)
        return out


class Inside(Causal):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BrokenBlock(), BrokenBlock()


class Shapely(Causal):
    """Python between the programs reads what every rank knows."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        scale = describe(x)
        x = self.second(x * scale, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def describe(x: Tensor) -> float:
    assert x.is_floating_point()
    assert x.dim() == 3
    return len(x) / (x.shape[1] + x.size(-1) + x.numel())


class Writing(Causal):
    """Python between the programs, and the next program, write in place."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True) + 0
        y = x.detach()
        write(x)
        x.mul_(0.5)
        torch._dynamo.graph_break()
        y = y + x
        x = self.second(x, is_causal=True) + y
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def write(x: Tensor) -> None:
    x.mul_(2).add_(x)
    x += 1


class WindowWritten(Causal):
    """A program writes a window of what came split, and gives it back whole."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True).clone()
        torch._dynamo.graph_break()
        x[:, 2:].mul_(2)
        torch._dynamo.graph_break()
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class ReadThenWritten(Causal):
    """Rows that a mask selects are read, which gathers; the next program writes, a third reads."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True).clone()
        chosen = ids > VOCAB // 2
        rows = x[chosen] + 3
        x[chosen] = rows
        torch._dynamo.graph_break()
        x.mul_(2)
        torch._dynamo.graph_break()
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class InnerGradient(Causal):
    """Asks for a gradient between its programs: Dynamo is awake while their backward runs."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        energy = x.square().mean()
        torch._dynamo.graph_break()
        (step,) = torch.autograd.grad(energy, self.embed.weight, retain_graph=True)
        torch._dynamo.graph_break()
        x = x - nn.functional.embedding(ids, step.detach())
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class Viewed(Causal):
    """Uncompiled code hands views of a split value on."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        later, last, turned = views(x)
        torch._dynamo.graph_break()
        x = turned.transpose(0, 1) + last[:, None] + nn.functional.pad(later, (0, 0, 1, 0))
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def views(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[:, 1:], x[:, -1], x.transpose(0, 1)


class Turned(Causal):
    """Uncompiled code changes shapes in place, as torch's own quantile does."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        x = turn(x * 2).transpose(0, 1) + middle(x)
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def middle(x: Tensor) -> Tensor:
    return x.quantile(0.5, dim=-1, keepdim=True)


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def turn(x: Tensor) -> Tensor:
    length = x.shape[1]
    x.transpose_(0, 1).unsqueeze_(0)
    assert x.shape[:2] == (1, length)
    return x.squeeze_(0)


class NoTokens(Base):
    """An empty memory, as a cache is before its first token."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(self.embed(ids), is_causal=True)
        empty = x[:, :0]
        torch._dynamo.graph_break()
        x = torch.cat([empty, x], 1)
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits, empty


class Python(Causal):
    """Uncompiled code computes with the value, token by token."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        y = between(x, self.first.norm.weight)
        x = self.second(x + y, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def between(x: Tensor, weight: Tensor) -> Tensor:
    assert not bool(x.isnan().any())
    y = x.double().tanh().to(x.dtype) * 2 + weight.detach()
    return torch.where(y > 0, y, x) - x.mean(-1, keepdim=True)


class InputsTrain(FromEmbeddings):
    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.first(embeddings, is_causal=True)
        torch._dynamo.graph_break()
        out: Tensor = self.second(x, is_causal=True).tanh()
        return out


class Heads(Causal):
    """What crosses is split in a dimension that holds heads or batch too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        flat, by_head = x.flatten(0, 1), x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        torch._dynamo.graph_break()
        x = flat.unflatten(0, (ids.shape[0], -1)) + by_head.transpose(1, 2).flatten(2)
        logits: Tensor = self.head(self.second(x, is_causal=True))
        return logits


class Needy(Causal):
    """Python between the programs looks at tokens in another order."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True)
        y = needs_all(x)
        x = self.second(x + y, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def needs_all(x: Tensor) -> Tensor:
    chosen = x[:, torch.arange(x.shape[1]).flip(0)]
    return chosen + x.flip(1)


class Modules(Causal):
    """Runs as ordinary Python with torch's own modules, which Dynamo does not compile alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in (self.first, self.second):
            x = block(x, is_causal=True)
            if float(x.detach().abs().max()) > 1e9:
                x = x.clamp(-1e9, 1e9)
        logits: Tensor = self.head(nn.functional.gelu(self.norm(x)))
        return logits


class Lost(Causal):
    """A write that the row taken before would have to show."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embed(ids), is_causal=True) + 0
        row = row_and_write(x)
        logits: Tensor = self.head(self.second(x + row[:, None], is_causal=True))
        return logits


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def row_and_write(x: Tensor) -> Tensor:
    row = x[:, 3]
    x += 1
    return row
