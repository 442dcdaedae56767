"""Attention written out over whole sequences, in float64, and how far a split one is from it.

Shapes: B batch, H query heads, G key/value heads, Q all queries, K all keys, D and E head dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
import torch.distributed as dist

from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.tiles import TileIndex, evaluate
from ringfx.ops import attention
from ringfx.ops.kernels.dropout import kept, key_numbers, row_numbers
from ringfx.ops.tiling import head_groups as heads
from ringfx.strategies import collective, ulysses

Tensor = torch.Tensor
LOWEST = torch.finfo(torch.float64).min
SPELLED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": lambda s, keep: s.masked_fill(~keep & keep.any(-1, keepdim=True), -math.inf),
    "nan": lambda s, keep: s.masked_fill(~keep, -math.inf),
    "mean": lambda s, keep: s.masked_fill(~keep, LOWEST),
    "absorbed": lambda s, keep: s + torch.zeros_like(s).masked_fill(~keep, LOWEST),
}
"""The spelling that each meaning of a row without keys is named after."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One attention with random data; everything picklable."""

    spec: AttentionSpec
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    v_head_dim: int = 8
    dtype: torch.dtype = torch.float64
    make_inputs: Callable[[], Sequence[Tensor]] = tuple
    """The captured tensors; floating ones get a gradient where ``trains_inputs``."""
    trains_inputs: bool = False
    strategy: str = "production"
    layout: LayoutKind = "contiguous"
    seed: int = 0
    spread: float = 1.0
    """Standard deviation of q, k and v."""
    label: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """Output and gradients over whole sequences, in float64."""

    out: Tensor
    grads: Mapping[str, Tensor] = field(default_factory=dict)
    largest_lse: float = 0.0
    """Largest magnitude of any row's logsumexp, where known."""


def data(example: Example) -> Data:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(example.seed)
    spec, B = example.spec, example.batch

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (example.spread * values).to(example.dtype)

    torch.manual_seed(example.seed)
    return Data(
        q=random(B, example.heads, spec.q_len, example.head_dim),
        k=random(B, example.kv_heads, spec.kv_len, example.head_dim),
        v=random(B, example.kv_heads, spec.kv_len, example.v_head_dim),
        dout=random(B, example.heads, spec.q_len, example.v_head_dim),
        inputs=tuple(example.make_inputs()),
    )


def _leaf(x: Tensor, wide: bool) -> Tensor:
    x = x.detach().double() if wide else x.detach().clone()
    return x.requires_grad_()


def _captured(example: Example, found: Data, wide: bool) -> list[Tensor]:
    def one(x: Tensor) -> Tensor:
        return _leaf(x, wide) if example.trains_inputs and x.is_floating_point() else x

    return [one(x) for x in found.inputs]


def reference(example: Example) -> Result:
    """Matmul and softmax over the whole score matrix."""
    spec, found = example.spec, data(example)
    q, k, v = (_leaf(x, True) for x in (found.q, found.k, found.v))
    inputs = _captured(example, found, True)
    groups = example.heads // example.kv_heads
    s = spec.scale * q @ k.repeat_interleave(groups, 1).transpose(-1, -2)
    if spec.soft_cap is not None:
        s = spec.soft_cap * torch.tanh(s / spec.soft_cap)
    index = TileIndex(
        b=torch.arange(example.batch),
        h=torch.arange(example.heads),
        q=torch.arange(spec.q_len),
        k=torch.arange(spec.kv_len),
    )
    if spec.score_map is not None:
        s = evaluate(spec.score_map, replace(index, score=s), inputs)
    if spec.bias is not None:
        s = s + evaluate(spec.bias, index, inputs)
    keep = torch.ones((), dtype=torch.bool)
    if spec.keep is not None:
        keep = evaluate(spec.keep, index, inputs).bool()
    if spec.branches:
        times = times_kept(spec, example.heads)
        s, keep = s + times.clamp(min=1).log(), keep & (times > 0)
    keep = keep.expand(s.shape)
    *inputs, seed = inputs if spec.dropout else [*inputs, torch.tensor(0)]
    if spec.sinks:
        s = s.masked_fill(~keep, -math.inf)
        s = torch.cat([s, inputs[-1][None, :, None, None].expand(*s.shape[:3], 1)], -1)
        largest_lse = float(s.detach().logsumexp(-1).abs().max())
    else:
        largest_lse = float(s.detach().logsumexp(-1).abs().max())
        s = SPELLED[spec.fully_masked](s, keep)
    p = torch.softmax(s, -1)[..., : spec.kv_len]
    if spec.fully_masked == "zero":
        p = p.masked_fill(~keep.any(-1, keepdim=True), 0.0)
    if spec.dropout:  # of rows without keys the mean of all values stays
        dropped = p * kept_weights(example, seed) / (1 - spec.dropout)
        p = torch.where(keep.any(-1, keepdim=True), dropped, p)
    out = p @ v.repeat_interleave(groups, 1)
    leaves = {"q": q, "k": k, "v": v}
    leaves |= {f"inputs[{i}]": x for i, x in enumerate(inputs) if x.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), found.dout.double())
    named = dict(zip(leaves, grads, strict=True))
    return Result(out=out.detach(), grads=named, largest_lse=largest_lse)


def kept_weights(example: Example, seed: Tensor) -> Tensor:
    """Which weights dropout keeps, [B, H, Q, K], numbered from where the spec says."""
    spec = example.spec
    b, h = torch.arange(example.batch), torch.arange(example.heads)
    first_q, first_k = spec.counts_from
    m, r = row_numbers(seed.reshape(()), b, h, torch.arange(spec.q_len) - first_q)
    c = key_numbers(seed.reshape(()), b, h, torch.arange(spec.kv_len) - first_k)
    return kept(m, r, c, spec.dropout) != 0


def times_kept(spec: AttentionSpec, heads: int) -> Tensor:
    """In how many branches of dilated attention each pair of one segment is kept, [H, Q, K]."""
    position, head = torch.arange(spec.q_len), torch.arange(heads)[:, None]
    times = torch.zeros(heads, spec.q_len, spec.q_len, dtype=torch.float64)
    for branch in spec.branches:
        kept = position % branch.segment % branch.rate == head % branch.rate
        segment = position // branch.segment
        times += kept[:, :, None] & kept[:, None] & (segment[:, None] == segment)
    return times


def split(x: Tensor, layout: Layout, rank: int) -> Tensor:
    """A rank's tokens; padding is garbage on purpose."""
    padded = x.new_full((*x.shape[:2], layout.padded_length, x.shape[3]), 3.25)
    padded[:, :, : layout.length] = x
    return padded[:, :, layout.positions(rank)]


def join(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    return torch.cat(list(parts), 2)[:, :, layout.order()]


def run(
    example: Example, ranks: dist.ProcessGroup | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's (split, whole) results of ringfx, over all ranks unless told otherwise."""
    rank, size, group = 0, 1, ""
    if dist.is_initialized():
        ranks = ranks or dist.group.WORLD
        assert ranks is not None, "it is initialised"
        rank, size, group = ranks.rank(), ranks.size(), ranks.group_name
    found, spec = data(example), example.spec
    q_layout = Layout(example.layout, spec.q_len, size)
    kv_layout = Layout(example.layout, spec.kv_len, size)
    q = split(found.q, q_layout, rank).requires_grad_()
    k, v = (split(x, kv_layout, rank).requires_grad_() for x in (found.k, found.v))
    inputs = _captured(example, found, False)
    out = attention(
        q,
        k,
        v,
        inputs,
        spec=spec.to_json(),
        strategy=example.strategy,
        layout=example.layout,
        group=group,
        name="layers.0",
    )
    assert out.dtype == q.dtype
    out.backward(split(found.dout, q_layout, rank))
    parts = {"out": out.detach(), "q": _grad(q), "k": _grad(k), "v": _grad(v)}
    whole = {f"inputs[{i}]": _grad(x) for i, x in enumerate(inputs) if x.requires_grad}
    return parts, whole


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "a gradient was lost"
    return leaf.grad


def run_all(
    examples: Sequence[Example], least_bytes: int | None = None
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Runs examples on this rank; ``least_bytes`` stands in for the size of a head group."""
    torch.set_num_threads(1)
    if least_bytes is not None:
        with (
            mock.patch.multiple(heads, GROUP_BYTES={"cpu": (4 * least_bytes, least_bytes)}),
            mock.patch.object(collective, "GATHERED_BYTES", least_bytes),
            mock.patch.object(ulysses, "GROUP_BYTES", {"cpu": least_bytes}),
        ):
            return run_all(examples)
    results = []
    for example in examples:
        try:
            results.append(run(example))
        except Exception as error:
            error.add_note(f"in example {example}")
            raise
    return results


def assemble(
    example: Example, by_rank: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> Result:
    """The whole results from those of all ranks; inputs' gradients must agree on all."""
    size = len(by_rank)
    layouts = {
        name: Layout(example.layout, length, size)
        for name, length in (
            ("out", example.spec.q_len),
            ("q", example.spec.q_len),
            ("k", example.spec.kv_len),
            ("v", example.spec.kv_len),
        )
    }
    joined = {
        name: join([parts[name] for parts, _ in by_rank], layout).double()
        for name, layout in layouts.items()
    }
    for name in by_rank[0][1]:
        for _, whole in by_rank:
            assert torch.equal(whole[name], by_rank[0][1][name]), f"{name} differs between ranks"
        joined[name] = by_rank[0][1][name].double()
    out = joined.pop("out")
    return Result(out=out, grads=joined)


def difference(ours: Result, oracle: Result) -> dict[str, float]:
    """max|ours - oracle| / max(max|oracle|, 1e-3) of the output and of each gradient.

    Both must be NaN at the same places.
    """
    assert ours.grads.keys() == oracle.grads.keys(), (ours.grads.keys(), oracle.grads.keys())
    pairs = {"out": (ours.out, oracle.out)}
    pairs |= {f"d{n}": (ours.grads[n], oracle.grads[n]) for n in oracle.grads}
    found = {}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, (name, a.shape, b.shape)
        lost = torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
        ratio = float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        found[name] = ratio if lost and math.isfinite(ratio) else math.inf
    return found
