"""Random configurations: the error is at most twice that of the unsplit kernel in the same dtype.

The error of a tensor x is ||x - x64||, with x64 from softmax written out in float64 on the same
(rounded) data. Norms, not maxima: which of two kernels has the larger worst element is chance.
Besides, one rounding of the largest tensor and of the float32 logsumexp is allowed: a tile's
backward has its weights from the logsumexp, while torch's unsplit attention falls back to storing
all of them where head dims differ, and then is exact where a row has one key.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ringfx.ir.layout import LayoutKind
from ringfx.ir.tiles import CAUSAL, H, K, Q, TileIndex, conjunction, evaluate
from ringfx.ops.kernels.kernel import MATH, Scores, accumulation_dtype
from tests.ops.cases import spec
from tests.ops.oracle import Data, Example, Result, assemble, data, reference, run_all
from tests.support.ranks import RankPool
from tests.support.sampling import one_in

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
FIXED_SLOPES = ("mul", ("div", ("add", H, ("const", 1)), ("const", -8)), ("sub", Q, K))


def random_example(seed: int, world_size: int) -> Example:
    draw = random.Random(seed)
    q_len = draw.randint(1, 90)
    kv_len = q_len if draw.random() < 0.7 else draw.randint(1, 90)
    kv_heads = draw.choice((1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 4))
    masks = [
        None,
        CAUSAL,
        conjunction(CAUSAL, ("gt", K, ("sub", Q, ("const", draw.randint(1, 40))))),
        ("le", ("abs", ("sub", Q, K)), ("const", draw.randint(0, 30))),
        ("or", CAUSAL, ("lt", K, ("const", draw.randint(1, 20)))),
        ("eq", ("floordiv", Q, ("const", 16)), ("floordiv", K, ("const", 16))),
        ("ne", ("mod", ("add", Q, K), ("const", 3)), ("const", 0)),
    ]
    strategies = ["simple", "collective", "production"]
    if heads % world_size == 0:
        strategies.append("ulysses")
    head_dim = draw.choice((8, 16, 24))
    strategy = draw.choice(strategies)
    layout: LayoutKind = "zigzag" if draw.random() < 0.5 else "contiguous"
    return Example(
        spec=replace(
            spec(q_len, kv_len, keep=draw.choice(masks)),
            bias=draw.choice((None, None, FIXED_SLOPES)),
            soft_cap=draw.choice((None, None, None, 5.0)),
        ),
        batch=draw.choice((1, 2, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=draw.choice((head_dim, head_dim, 8, 32)),
        dtype=draw.choice(DTYPES),
        strategy=strategy,
        layout=layout,
        seed=seed,
        label=f"seed {seed}, {world_size} ranks, {strategy}, {layout}",
    )


def unsplit(example: Example) -> Result:
    """torch's own attention over whole sequences in the example's dtype.

    torch has no kernel with a soft cap; there it is ringfx's reference kernel on one whole tile.
    """
    found: Data = data(example)
    s = example.spec
    q, k, v = (x.detach().clone().requires_grad_() for x in (found.q, found.k, found.v))
    index = TileIndex(
        b=torch.arange(example.batch),
        h=torch.arange(example.heads),
        q=torch.arange(s.q_len),
        k=torch.arange(s.kv_len),
    )
    wide = torch.float64 if example.dtype == torch.float64 else torch.float32
    shape = (example.batch, example.heads, s.q_len, s.kv_len)
    mask = torch.zeros(shape, dtype=wide)
    if s.bias is not None:
        mask = mask + evaluate(s.bias, index, ())
    if s.keep is not None:
        mask = mask.masked_fill(~evaluate(s.keep, index, ()).expand(shape), -torch.inf)
    if s.soft_cap is not None:
        return _one_tile(found, Scores(scale=s.scale, bias_BHQK=mask, soft_cap=s.soft_cap))
    groups = example.heads // example.kv_heads
    wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, wide_k, wide_v, mask.to(q.dtype), scale=s.scale)
    return _result(out.detach(), torch.autograd.grad(out, (q, k, v), found.dout))


def _one_tile(found: Data, scores: Scores) -> Result:
    q, k, v = found.q, found.k, found.v
    out, lse = MATH.forward(q, k, v, scores)
    grads = MATH.backward(found.dout, q, k, v, out.to(q.dtype), lse, scores)
    return _result(out.to(q.dtype), tuple(grad.to(q.dtype) for grad in grads))


def _result(out: torch.Tensor, grads: Sequence[torch.Tensor]) -> Result:
    named = {name: grad.double() for name, grad in zip("qkv", grads, strict=True)}
    return Result(out=out.double(), grads=named)


def errors(found: Result, oracle: Result) -> dict[str, float]:
    """Norm of the error of the output and of each gradient over the largest norm of any."""
    pairs = {"out": (found.out, oracle.out)}
    pairs |= {f"d{name}": (found.grads[name], oracle.grads[name]) for name in oracle.grads}
    largest = max(float(exact.norm()) for _, exact in pairs.values()) or 1.0
    return {name: float((x - exact).norm()) / largest for name, (x, exact) in pairs.items()}


def compare(seeds: range, world_size: int, pool: RankPool | None) -> list[str]:
    examples = [random_example(seed, world_size) for seed in seeds]
    by_rank = pool.run(run_all, examples, 2048) if pool else [run_all(examples, 2048)]
    wrong = []
    for example, results in zip(examples, zip(*by_rank, strict=True), strict=True):
        oracle = reference(example)
        ours = errors(assemble(example, results), oracle)
        theirs = errors(unsplit(example), oracle)
        kept_in = torch.finfo(accumulation_dtype(example.dtype))
        rounding = torch.finfo(example.dtype).eps + kept_in.eps * oracle.largest_lse
        for name, error in ours.items():
            if not error <= 2 * theirs[name] + rounding + 1e-12:
                wrong.append(f"{example}\n  {name}: {error:.2e}, unsplit {theirs[name]:.2e}")
    return wrong


def test_random_configurations_on_one_rank() -> None:
    assert compare(range(0, 60), 1, None) == []


@pytest.mark.ranks
def test_random_configurations_on_two_ranks(ranks2: RankPool) -> None:
    assert compare(range(1000, 1060), 2, ranks2) == []


@pytest.mark.ranks
def test_random_configurations_on_three_ranks(ranks3: RankPool) -> None:
    assert compare(one_in(2, range(2000, 2060)), 3, ranks3) == []


@pytest.mark.ranks
@pytest.mark.slow
def test_two_thousand_random_configurations(
    ranks2: RankPool, ranks3: RankPool, ranks4: RankPool
) -> None:
    wrong = compare(range(10_000, 10_500), 1, None)
    for size, pool in ((2, ranks2), (3, ranks3), (4, ranks4)):
        wrong += compare(range(10_000 * size, 10_000 * size + 500), size, pool)
    assert wrong == []
