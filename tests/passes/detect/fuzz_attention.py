"""Random spellings of attention: legal ones are found and equal, broken ones are refused or equal.

    python -m tests.passes.detect.fuzz_attention 0 2000 --record RECORD.json
    python -m tests.passes.detect.fuzz_attention 0 500 --types --record RECORD.json

Records are kept beside this file (``fuzz_record.json``, ``fuzz_types_record.json``).

A spelling is drawn piece by piece: sizes (often all equal, so that only axes tell them apart), the
form of both products, the place of the scale, the mask, the softmax. A mutation breaks one piece.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.end_to_end.mixed import Mixed, ambient
from tests.end_to_end.mixed import check as check_on_ranks
from tests.support.direct import called, canonical, program_of, results, results_of, worst
from tests.support.ranks import RankPool

__all__ = ["check", "spelling"]

Tensor = torch.Tensor
LOWEST = torch.finfo(torch.float32).min
MUTATIONS = (
    "none", "none", "none", "softmax over queries", "softmax over heads", "weights used again",
    "scores used again", "keys are values", "queries are keys", "values transposed",
    "weights transposed", "heads swapped", "mask transposed", "scores squared", "scores shifted",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    batch: int
    heads: int
    tokens: int
    width: int


class Model(nn.Module):
    def __init__(self, sizes: Sizes, body: Callable[..., Tensor]) -> None:
        super().__init__()
        hidden = sizes.heads * sizes.width
        self.sizes, self.body = sizes, body
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        s = self.sizes
        q, k, v = (
            f(x).view(s.batch, s.tokens, s.heads, s.width).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        return self.body(q, k, v)


def letters(rng: random.Random, n: int) -> list[str]:
    return rng.sample("abcdefghijklmnopqrstuvwxyz", n)


def by_einsum(rng: random.Random) -> Callable[[Tensor, Tensor], Tensor]:
    b, h, i, j, d = letters(rng, 5)
    equation = f"{b}{h}{i}{d},{b}{h}{j}{d}->{b}{h}{i}{j}"
    return lambda q, k: torch.einsum(equation, q, k)


def permuted(rng: random.Random) -> Callable[[Tensor, Tensor], Tensor]:
    """An einsum on operands in random layouts."""
    names = letters(rng, 5)
    b, h, i, j, d = names
    orders = [rng.sample(range(4), 4) for _ in range(2)]
    left, right = ("".join([b, h, t, d][p] for p in o) for t, o in zip((i, j), orders, strict=True))
    equation = f"{left},{right}->{b}{h}{i}{j}"
    return lambda q, k: torch.einsum(equation, q.permute(orders[0]), k.permute(orders[1]))


def folded(q: Tensor, k: Tensor) -> Tensor:
    b, h, n, d = q.shape
    left, right = q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2)
    return torch.bmm(left, right).view(b, h, n, n)


def in_parts(q: Tensor, k: Tensor) -> Tensor:
    """Two products of parts of the head dim."""
    return q[..., :2] @ k[..., :2].mT + q[..., 2:] @ k[..., 2:].mT


def added(q: Tensor, k: Tensor) -> Tensor:
    b, h, n, d = q.shape
    left, right = q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2)
    return torch.baddbmm(q.new_zeros(b * h, n, n), left, right, beta=0).view(b, h, n, n)


def product(rng: random.Random) -> Callable[[Tensor, Tensor], Tensor]:
    return rng.choice((
        lambda q, k: q @ k.transpose(-1, -2),
        lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)),
        lambda q, k: (k @ q.mT).mT,
        lambda q, k: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1),
        lambda q, k: torch.einsum("bhqd,bhkd,h->bhqk", q, k, q.new_ones(q.shape[1])),
        in_parts, added, folded, by_einsum(rng), permuted(rng),
    ))  # fmt: skip


def value_product(rng: random.Random) -> Callable[[Tensor, Tensor], Tensor]:
    b, h, i, j, d = letters(rng, 5)
    equation = f"{b}{h}{i}{j},{b}{h}{j}{d}->{b}{h}{i}{d}"
    return rng.choice((
        lambda p, v: p @ v,
        lambda p, v: (v.mT @ p.mT).mT,
        lambda p, v: torch.einsum(equation, p, v),
        lambda p, v: torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(v.shape),
    ))  # fmt: skip


def mask(rng: random.Random) -> Callable[[Tensor], Tensor]:
    def keep(s: Tensor) -> Tensor:
        return torch.ones(s.shape[-2], s.shape[-1], dtype=torch.bool).tril()

    low = rng.choice((-math.inf, LOWEST, -1e9))
    return rng.choice((
        lambda s: s,
        lambda s: s.masked_fill(~keep(s), low),
        lambda s: torch.where(keep(s), s, low),
        lambda s: s + torch.zeros(keep(s).shape, dtype=s.dtype).masked_fill(~keep(s), low),
        lambda s: s + torch.arange(s.shape[-1]) * 0.1,
        lambda s: 3 * torch.tanh(s / 3),
        lambda s: s / torch.linspace(0.5, 2.0, s.shape[-2])[:, None],
    ))  # fmt: skip


def exponentials(s: Tensor, dim: int) -> Tensor:
    e = (s - s.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def masked_later(s: Tensor, dim: int) -> Tensor:
    """A triangle of exponentials; the sum of what is left."""
    keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    e = (s - s.amax(dim, keepdim=True)).exp() * (keep if dim == -1 else keep.mT)
    return e * e.sum(dim, keepdim=True).reciprocal()


def renormalised(s: Tensor, dim: int) -> Tensor:
    rows, columns = (torch.arange(n) for n in s.shape[-2:])
    p = s.softmax(dim).masked_fill(rows[:, None] + 1 == columns, 0.0)
    return p / p.sum(dim, keepdim=True)


def softmax(rng: random.Random) -> Callable[[Tensor, int], Tensor]:
    return rng.choice((
        masked_later, renormalised,
        lambda s, dim: s.exp2() / (s.exp2().sum(dim, keepdim=True) + 0.5),
        lambda s, dim: s.exp() / s.exp().sum(dim, keepdim=True),
        lambda s, dim: s.softmax(dim),
        lambda s, dim: torch.softmax(s, dim % 4),
        lambda s, dim: (s - s.logsumexp(dim, keepdim=True)).exp(),
        lambda s, dim: s.log_softmax(dim).exp(),
        exponentials,
    ))  # fmt: skip


def spelling(seed: int) -> tuple[Model, Tensor, str]:
    """A model, its input, and what was broken in it."""
    rng = random.Random(seed)
    equal = rng.random() < 0.5
    sizes = Sizes(batch=4, heads=4, tokens=4, width=4) if equal else Sizes(
        batch=2, heads=3, tokens=5, width=4
    )  # fmt: skip
    broken = rng.choice(MUTATIONS)
    if not equal and broken in ("values transposed", "heads swapped"):
        broken = "none"
    make, weigh, give, change = product(rng), softmax(rng), value_product(rng), mask(rng)
    scale, place = rng.choice((1.0, 0.5, 0.37)), rng.choice("qks")

    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (q * scale if place == "q" else q), (k * scale if place == "k" else k)
        k = q if broken == "queries are keys" else k
        v = k if broken == "keys are values" else v.mT if broken == "values transposed" else v
        v = v.transpose(0, 1) if broken == "heads swapped" else v
        s = make(q, k)
        s = s * scale if place == "s" else s
        s = s.square() if broken == "scores squared" else s
        s = s.roll(1, -1) if broken == "scores shifted" else s
        s = change(s.mT).mT if broken == "mask transposed" else change(s)
        dim = {"softmax over queries": -2, "softmax over heads": 1}.get(broken, -1)
        p = weigh(s, dim)
        out = give(p.mT if broken == "weights transposed" else p, v)
        used: Any = p if broken == "weights used again" else s
        again = broken in ("weights used again", "scores used again")
        return out + used.clamp(-5, 5).mean() if again else out

    torch.manual_seed(seed)
    model = Model(sizes, body).double()
    x = torch.randn(sizes.batch, sizes.tokens, sizes.heads * sizes.width, dtype=torch.float64)
    return model, x, broken


LEGAL = ("none", "keys are values", "queries are keys", "values transposed", "heads swapped")


def check(seed: int) -> bool:
    """Raises where a spelling is missed or changed; returns whether attention was found."""
    model, x, broken = spelling(seed)
    program, values = program_of(model, [x])
    before = results(program, values)
    sites = canonical(program)
    assert sites.found or broken not in LEGAL, f"seed {seed} ({broken}): {sites.declined}"
    difference = worst(results(program, values), before)
    assert difference < 1e-8, f"seed {seed} ({broken}) differs by {difference:.1e}"
    return bool(sites.found)


def in_types(seed: int, exact: bool = False) -> tuple[Model, Tensor, str]:
    """The spelling of a seed with float32 weights, its operands in types drawn for each."""
    model, x, broken = spelling(seed)
    if exact:
        return model, x, broken
    rng, body = random.Random(f"types {seed}"), model.body
    drawn = [rng.choice((torch.float32, torch.bfloat16)) for _ in range(3)]

    def mixed(*operands: Tensor) -> Tensor:
        return body(*(y.to(t) for y, t in zip(operands, drawn, strict=True)))

    model.body = mixed
    return model.float(), x.float(), broken


def under_autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.autocast("cpu", torch.bfloat16)(call)  # type: ignore[no-any-return]


def check_types(seed: int) -> bool:
    """As ``check``, under autocast: within twice the model's own distance from float64."""
    model, x, broken = in_types(seed)
    wide, wide_x, _ = in_types(seed, exact=True)
    exact = results(*program_of(wide, [wide_x]))
    values = [*model.parameters(), x]
    try:
        unsplit = results_of(under_autocast(partial(called, model)), values)
    except RuntimeError:
        return False  # a number that no bfloat16 can be is written into the scores
    with torch.autocast("cpu", torch.bfloat16):
        program, _ = program_of(model, [x])
    sites = canonical(program)
    assert sites.found or broken not in LEGAL, f"seed {seed} ({broken}): {sites.declined}"
    largest = max(float(t.norm()) for t in exact)
    for true, near, ours in zip(exact, unsplit, results(program, values), strict=True):
        # The gradient of a key's bias, say, is zero in theory: what it is instead is chance.
        chance = 2**-9 * max(float(true.norm()), 0.5 * largest)
        allowed = 2 * float((near.double() - true).norm()) + chance
        found = float((ours.double() - true).norm())
        assert ours.dtype == near.dtype, f"seed {seed} ({broken}): {ours.dtype}, {near.dtype}"
        assert found <= allowed or near.isnan().any(), (
            f"seed {seed} ({broken}): {found:.1e}, allowed {allowed:.1e}"
        )
    return bool(sites.found)


def on_ranks(seed: int) -> Mixed | None:
    """The same as a case that ranks can run; None where nothing may be found, or autocast fails."""
    model, x, broken = in_types(seed)
    try:
        finite = under_autocast(model)(x).isfinite().all()
    except RuntimeError:
        return None
    if broken not in LEGAL or not finite:
        return None
    return Mixed(
        model=partial(_model, seed), inputs=partial(_inputs, seed), recipe=ambient, sites=1,
        floor=0.5, label=f"seed {seed} ({broken})",
    )  # fmt: skip


def _model(seed: int) -> nn.Module:
    return in_types(seed)[0]


def _inputs(seed: int) -> dict[str, Tensor]:
    return {"x": in_types(seed)[1]}


def check_seeds(seeds: range) -> int:
    return sum(check(seed) for seed in seeds)


def check_types_on_ranks(pools: Sequence[RankPool], seeds: range) -> int:
    """In random types under autocast: in this process, and the legal ones on every pool."""
    found = sum(check_types(seed) for seed in seeds)
    cases = [case for case in map(on_ranks, seeds) if case is not None]
    for pool in pools:
        check_on_ranks(pool, cases)
    return found


def main(first: int, stop: int, record: Path | None, types: bool) -> None:
    """Check seeds in pieces of 50, each noted as soon as it is done."""
    pools = [RankPool(2), RankPool(3)] if types else []
    piece = partial(check_types_on_ranks, pools) if types else check_seeds
    for start in range(first, stop, 50):
        end = min(start + 50, stop)
        found = piece(range(start, end))
        print(
            f"seeds {start}..{end - 1}: {found} found, {end - start - found} refused, none wrong",
            flush=True,
        )
        if record is not None:
            note(record, start, end, found)
    for pool in pools:
        pool.close()


def note(record: Path, first: int, stop: int, found: int) -> None:
    """Add a piece to the committed record: what was found right, when, and with which torch."""
    known = json.loads(record.read_text()) if record.exists() else {"pieces": {}}
    today = datetime.date.today().isoformat()
    known["pieces"][f"{first}-{stop - 1}"] = {
        "found": found, "refused": stop - first - found, "wrong": 0, "date": today,
        "torch": torch.__version__,
    }  # fmt: skip
    pieces = known["pieces"].values()
    known["total"] = {key: sum(p[key] for p in pieces) for key in ("found", "refused", "wrong")} | {
        "seeds": sum(p["found"] + p["refused"] for p in pieces)
    }
    order = sorted(known["pieces"].items(), key=lambda item: int(item[0].split("-")[0]))
    known["pieces"] = dict(order)
    record.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("stop", type=int, nargs="?", default=2000)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--types", action="store_true", help="mixed, under autocast, 2 and 3 ranks")
    main(**vars(parser.parse_args()))
