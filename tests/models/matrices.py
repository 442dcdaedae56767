"""Attention under masks and biases with an entry for each query and key, given or computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["HEADS", "HIDDEN", "MATRICES", "Matrices", "inputs"]

Tensor = torch.Tensor
HIDDEN, HEADS, MOST = 16, 2, 56


class Matrices(nn.Module):
    """Two layers of attention under one kind of matrix."""

    def __init__(self, kind: str, seq_len: int) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.kind = kind
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2)])
        self.bias = nn.Parameter(torch.randn(HEADS, seq_len, seq_len))
        self.longer = nn.Parameter(torch.randn(1, HEADS, MOST, MOST))
        self.narrow, self.pair = nn.Linear(HIDDEN, 3), nn.Linear(3, HEADS)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            found = MATRICES[self.kind].attend(self, x, (q, k, v), *given)
            x = x + found.transpose(1, 2).flatten(2)
        return x.tanh()


Attend = Callable[..., Tensor]


def sdpa(mask: Callable[..., Tensor]) -> Attend:
    def attend(m: Matrices, x: Tensor, qkv: Sequence[Tensor], *given: Tensor) -> Tensor:
        q, k, v = qkv
        return F.scaled_dot_product_attention(q, k, v, mask(m, x, *given))

    return attend


def spelled(bias: Callable[..., Tensor], causal: bool = False) -> Attend:
    def attend(m: Matrices, x: Tensor, qkv: Sequence[Tensor], *given: Tensor) -> Tensor:
        q, k, v = qkv
        scores = q @ k.mT * 0.4 + bias(m, x, *given)
        if causal:
            scores = scores.masked_fill(~below(x.shape[1]), -math.inf)
        return scores.softmax(-1) @ v

    return attend


def kept(keep: Callable[..., Tensor], causal: bool = False) -> Attend:
    def attend(m: Matrices, x: Tensor, qkv: Sequence[Tensor], *given: Tensor) -> Tensor:
        q, k, v = qkv
        seen = keep(m, x, *given)
        seen = seen & below(x.shape[1]) if causal else seen
        return (q @ k.mT * 0.4).masked_fill(~seen, -math.inf).softmax(-1) @ v

    return attend


def below(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def alike(m: Matrices, x: Tensor) -> Tensor:
    """Tokens whose vectors point the same way."""
    return ((x @ x.mT) > 0)[:, None]


def products(m: Matrices, x: Tensor) -> Tensor:
    return (x @ x.mT)[:, None].tanh()


def differences(m: Matrices, x: Tensor) -> Tensor:
    y = m.narrow(x)
    found: Tensor = m.pair((y[:, :, None] - y[:, None]).tanh())
    return found.permute(0, 3, 1, 2)


def distances(m: Matrices, x: Tensor) -> Tensor:
    y = m.narrow(x)
    return -torch.cdist(y, y)[:, None]


def of_pairs(m: Matrices, x: Tensor, z: Tensor) -> Tensor:
    found: Tensor = m.pair(z)
    return found.permute(0, 3, 1, 2)


def looked_up(m: Matrices, x: Tensor, numbers: Tensor) -> Tensor:
    """A learned number a head for each kind of pair, as Graphormer adds them."""
    return F.embedding(numbers, m.narrow.weight.T)[..., :HEADS].permute(0, 3, 1, 2)


def part(m: Matrices, x: Tensor) -> Tensor:
    return m.longer[:, :, : x.shape[1], : x.shape[1]]


def offset_part(m: Matrices, x: Tensor) -> Tensor:
    return m.longer[:, :, 2 : 2 + x.shape[1], 1 : 1 + x.shape[1]]


def drawn(m: Matrices, x: Tensor) -> Tensor:
    n = x.shape[1]
    return (torch.rand(n, n) > 0.5) | torch.eye(n, dtype=torch.bool)


def given_bool(*leading: int) -> Callable[[int], Sequence[Tensor]]:
    return lambda n: (uniform(*leading, n, n) > 0.4,)


def with_diagonal(*leading: int) -> Callable[[int], Sequence[Tensor]]:
    return lambda n: ((uniform(*leading, n, n) > 0.4) | torch.eye(n, dtype=torch.bool),)


def given_float(*leading: int) -> Callable[[int], Sequence[Tensor]]:
    return lambda n: (uniform(*leading, n, n).requires_grad_(),)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True, eq=False)
class Kind:
    attend: Attend
    given: Callable[[int], Sequence[Tensor]] = lambda n: ()
    rows: str = "given"
    """What is said of them: "given" or "computed" whole, or "" where nothing is held whole."""


MATRICES: Mapping[str, Kind] = {
    "bool": Kind(sdpa(lambda m, x, given: given), given_bool()),
    "bool, batch": Kind(sdpa(lambda m, x, given: given), given_bool(2, 1)),
    "bool, causal": Kind(sdpa(lambda m, x, given: given & below(x.shape[1])), with_diagonal()),
    "float": Kind(sdpa(lambda m, x, given: given), given_float(2, HEADS)),
    "float, causal": Kind(spelled(lambda m, x, given: given, causal=True), given_float(1, 1)),
    "numbers, 4d": Kind(
        spelled(lambda m, x, given: (1 - given) * -1e9),
        lambda n: (with_diagonal(2, 1)(n)[0] * 1.0,),
    ),
    "expanded": Kind(
        sdpa(lambda m, x, given: given),
        lambda n: (with_diagonal(1, 1)(n)[0].expand(2, HEADS, n, n),),
    ),
    "transposed": Kind(sdpa(lambda m, x, given: given.mT), with_diagonal(2, 1)),
    "both ways": Kind(sdpa(lambda m, x, given: given | given.mT), with_diagonal(2, 1)),
    "both ways, float": Kind(spelled(lambda m, x, given: given - given.mT), given_float()),
    "longer": Kind(
        sdpa(lambda m, x, given: given[:, :, : x.shape[1], : x.shape[1]]),
        lambda n: (with_diagonal(2, 1)(n + 5)[0],),
    ),
    "learned": Kind(spelled(lambda m, x: m.bias)),
    "learned, causal": Kind(spelled(lambda m, x: m.bias, causal=True)),
    "learned, a part": Kind(spelled(part)),
    "learned, a part elsewhere": Kind(spelled(offset_part, causal=True)),
    "learned, looked up": Kind(
        spelled(looked_up),
        lambda n: ((uniform(2, n, n) * HIDDEN).long(),),
    ),
    "of given pairs": Kind(
        spelled(of_pairs), lambda n: (uniform(2, n, n, 3).requires_grad_(),), rows=""
    ),
    "drawn": Kind(sdpa(drawn), rows=""),
    "alike": Kind(kept(alike), rows=""),
    "alike, causal": Kind(kept(alike, causal=True), rows=""),
    "products": Kind(spelled(products), rows=""),
    "products, causal": Kind(spelled(products, causal=True), rows=""),
    "differences": Kind(spelled(differences), rows=""),
    "distances": Kind(spelled(distances, causal=True), rows=""),
}  # fmt: skip


def inputs(kind: str, seq_len: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seq_len)
    x = torch.randn(2, seq_len, HIDDEN, generator=generator).requires_grad_()
    return (x, *MATRICES[kind].given(seq_len))
