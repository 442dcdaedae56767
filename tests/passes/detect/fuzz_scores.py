"""Random scores: trained numbers, maps of whole rows, gates and dropout; split, and equal.

    python -m tests.passes.detect.fuzz_scores 0 2000

A spelling of ``fuzz_attention`` (products, a scale, a mask) with what a kind puts between scores
and values. Each runs on two or three ranks that are threads. With trained numbers and with dropout
attention must be found; with the rest no rank may have what is as long as it is wide.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.detect.fuzz_attention import Sizes, mask, product, value_product
from tests.support.direct import worst
from tests.support.split_here import SplitHere, split_here

__all__ = ["check_scores"]

Tensor = torch.Tensor
SIZES = (
    Sizes(batch=2, heads=2, tokens=7, width=4), Sizes(batch=1, heads=3, tokens=9, width=2),
    Sizes(batch=2, heads=4, tokens=6, width=3), Sizes(batch=3, heads=2, tokens=13, width=4),
)  # fmt: skip
P = 0.3


class Scored(nn.Module):
    """q, k and v of x; numbers of every kind that scores may have."""

    def __init__(self, sizes: Sizes, draw: random.Random, kind: str) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, heads, n = sizes.heads * sizes.width, sizes.heads, sizes.tokens
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.alone, self.listed = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.rand(1) + 0.5)
        self.by_head = nn.Parameter(torch.rand(heads, 1, 1) + 0.4)
        self.table = nn.Parameter(torch.randn(2 * n, heads))
        self.mixing = nn.Parameter(torch.randn(heads, heads))
        self.scale, self.change = draw.choice((1.0, 0.5, 0.37)), mask(draw)
        self.make, self.give = product(draw), value_product(draw)
        self.weigh = KINDS[kind](draw)

    def forward(self, x: Tensor) -> Tensor:
        s = self.sizes
        q, k, v = (
            f(x).view(s.batch, s.tokens, s.heads, s.width).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        weights = self.weigh(self, self.make(q, k) * self.scale)
        mixed: Tensor = x + self.o(self.give(weights, v).transpose(1, 2).flatten(2))
        return mixed


Weigh = Callable[[Scored, Tensor], Tensor]


def masked(weigh: Weigh) -> Weigh:
    return lambda m, s: weigh(m, m.change(s))


def softmax(draw: random.Random) -> Callable[[Tensor], Tensor]:
    return draw.choice((
        lambda s: s.softmax(-1),
        lambda s: F.softmax(s, 3),
        lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
        lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
        lambda s: s.log_softmax(-1).exp(),
    ))  # fmt: skip


def far(s: Tensor) -> Tensor:
    n = s.shape[-1]
    return (torch.arange(n)[:, None] - torch.arange(n)).abs()


def number(draw: random.Random) -> Callable[[Scored], Tensor]:
    """One that is trained, for all heads or for each, maybe mapped to others that are positive."""
    which = draw.choice((lambda m: m.alone, lambda m: m.listed, lambda m: m.by_head))
    change = draw.choice((
        lambda w: w, torch.exp, F.softplus, torch.sigmoid, lambda w: w.clamp(0.2, 0.9),
        lambda w: 1 / w, lambda w: w.square() + 0.1,
    ))  # fmt: skip
    return lambda m: change(which(m))


def trained(draw: random.Random) -> Weigh:
    one, other, last = number(draw), number(draw), softmax(draw)
    maps: list[Callable[[Scored, Tensor], Tensor]] = [
        lambda m, s: s * one(m), lambda m, s: s / one(m), lambda m, s: s - one(m) * far(s),
        lambda m, s: one(m) * torch.tanh(s / one(m)), lambda m, s: s + other(m) * torch.sigmoid(s),
        lambda m, s: s + m.table[s.shape[-1] - far(s)].permute(2, 0, 1) * other(m),
        lambda m, s: s - torch.log1p(one(m) * far(s)), lambda m, s: s * (other(m) + one(m)),
        lambda m, s: s * torch.exp(-one(m) * far(s)),
    ]  # fmt: skip
    chosen = draw.sample(maps, draw.choice((1, 1, 2)))

    def weigh(m: Scored, s: Tensor) -> Tensor:
        for change in chosen:
            s = change(m, s)
        return last(m.change(s))  # a number of any sign times -inf would be none

    return weigh


def kept(s: Tensor, count: int) -> Tensor:
    return s >= s.topk(count, -1).values[..., -1:]


def sparse(s: Tensor) -> Tensor:
    s = s.clamp(min=-50)
    z = s.sort(-1, descending=True).values
    total = z.cumsum(-1) - 1
    size = (torch.arange(1, s.shape[-1] + 1) * z > total).sum(-1, keepdim=True)
    return (s - total.gather(-1, size - 1) / size).clamp(min=0)


def row_map(draw: random.Random) -> Weigh:
    count, last, share = draw.randint(1, 4), softmax(draw), draw.uniform(0.3, 0.9)

    def top_p(s: Tensor) -> Tensor:
        w = last(s)
        p, at = w.sort(-1, descending=True)
        w = w * torch.zeros_like(w).scatter(-1, at, (p.cumsum(-1) - p < share).to(w.dtype))
        return w / w.sum(-1, keepdim=True)

    def sticks(s: Tensor) -> Tensor:
        s = s.clamp(min=-50)
        left = F.logsigmoid(-s)
        return (F.logsigmoid(s) + left.flip(-1).cumsum(-1).flip(-1) - left).exp()

    maps: tuple[Callable[[Scored, Tensor], Tensor], ...] = (
        lambda m, s: last(s.masked_fill(~kept(s, count), -1e30)),
        lambda m, s: top_p(s), lambda m, s: sparse(s), lambda m, s: sticks(s),
        lambda m, s: s.clamp(min=-50).sigmoid() * m.alone,
        lambda m, s: F.relu(s).square() / s.shape[-1],
        lambda m, s: F.normalize(s.clamp(min=-50), dim=-1),
        lambda m, s: last(torch.einsum("bhqk,hg->bgqk", s.clamp(min=-50), m.mixing)),
        lambda m, s: torch.einsum("bhqk,hg->bgqk", last(s), m.mixing),
        lambda m, s: last(s.masked_fill(s < s.clamp(min=-50).mean(-1, keepdim=True) - 1, -1e30)),
    )  # fmt: skip
    return masked(draw.choice(maps))


def gate(draw: random.Random) -> Weigh:
    """After the softmax: a number of heads, of rows, of pairs; or weights of positions mixed in."""
    one, last = number(draw), softmax(draw)

    def mixed(m: Scored, s: Tensor) -> Tensor:
        share = m.by_head.sigmoid()
        return (1 - share) * last(s) + share * (-far(s) * m.alone.square()).softmax(-1)

    def of_rows(m: Scored, s: Tensor) -> Tensor:
        return last(s) * s.clamp(min=-50).amax(-1, keepdim=True).sigmoid()

    def again(w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 0.1)

    gates: tuple[Callable[[Scored, Tensor], Tensor], ...] = (
        mixed, of_rows, lambda m, s: last(s) * one(m), lambda m, s: again(mixed(m, s)),
        lambda m, s: again(last(s) * torch.exp(-0.1 * far(s))),
        lambda m, s: last(s) * m.table[far(s)].permute(2, 0, 1).sigmoid(),
        lambda m, s: last(s) * s.clamp(-5, 5).sigmoid(),
    )  # fmt: skip
    return masked(draw.choice(gates))


def dropout(draw: random.Random) -> Weigh:
    last = softmax(draw)
    drops: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda w: F.dropout(w, P, True),
        nn.Dropout(P),
        lambda w: w * (torch.rand_like(w) >= P) / (1 - P),
        lambda w: w * torch.full_like(w, 1 - P).bernoulli() / (1 - P),
        lambda w: w.masked_fill(torch.rand(w.shape) < P, 0) / (1 - P),
    )
    drop = draw.choice(drops)
    return masked(lambda m, s: drop(last(s)))


KINDS: Mapping[str, Callable[[random.Random], Weigh]] = {
    "trained": trained, "row map": row_map, "gate": gate, "dropout": dropout,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drawn:
    kind: str
    sizes: Sizes
    ranks: int
    seed: int

    def model(self) -> Scored:
        torch.manual_seed(self.seed)
        return Scored(self.sizes, random.Random(f"pieces {self.seed}"), self.kind)

    def split(self, ranks: int) -> SplitHere:
        s = self.sizes
        model, x = self.model(), torch.randn(s.batch, s.tokens, s.heads * s.width)
        torch.manual_seed(self.seed)
        return split_here(model, [x], ranks)


def drawn(seed: int) -> Drawn:
    draw = random.Random(f"scores {seed}")
    kind = draw.choice([*KINDS])
    return Drawn(kind=kind, sizes=draw.choice(SIZES), ranks=draw.choice((2, 3)), seed=seed)


def check_scores(seed: int) -> str:
    """Raises where a spelling is wrong, or whole on every rank; returns its kind."""
    given = drawn(seed)
    found, said = given.split(given.ranks), f"seed {seed} ({given.kind})"
    plan = found.program.plan
    if given.kind == "dropout":
        alone = given.split(1).results[0]
        difference = max(worst(each, alone) for each in found.results)
        spec = [layer.site.spec for layer in plan.layers]
        assert [math.isclose(x.dropout, P) for x in spec] == [True], f"{said}: {plan.declined}"
    else:
        difference = found.worst
    assert difference < 1e-8, f"{said} differs by {difference:.1e}"
    if given.kind == "trained":
        assert len(plan.layers) == 1, f"{said}: {plan.declined} {plan.missed}"
    whole = squares(found, given.sizes.tokens)
    assert not whole, f"{said}: {whole}, {found.gathered}"
    return given.kind


def squares(found: SplitHere, length: int) -> list[str]:
    """Values of the local program that have all rows and all columns of what q and k make."""
    whole: list[str] = []
    given = {n for n in found.program.local.graph_module.graph.nodes if n.op == "placeholder"}
    hidden = {n for n in given if n.meta["val"].dim() == 3}
    computed: set[torch.fx.Node] = set()
    for node in found.program.local.graph_module.graph.nodes:
        if node in hidden or computed.intersection(node.all_input_nodes):
            computed.add(node)
            shape = getattr(node.meta.get("val"), "shape", ())
            whole += [str(node)] if [*shape].count(length) > 1 else []
    return whole


def main(first: int, stop: int) -> None:
    counts: dict[str, int] = {}
    for seed in range(first, stop):
        kind = check_scores(seed)
        counts[kind] = counts.get(kind, 0) + 1
        if (seed + 1) % 50 == 0 or seed + 1 == stop:
            print(f"seeds {first}..{seed}: {counts}, none wrong", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("stop", type=int, nargs="?", default=200)
    main(**vars(parser.parse_args()))
