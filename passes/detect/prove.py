"""Each match proved: the calls as they stand against the canonical form, on small random values.

Every axis gets a size of its own (``trial_sizes.py``). The region runs in float64; its masks are
evaluated from the expressions that the canonical form was read from, over noise for the tensors
that these capture. Where the region drops weights at random, both forms drop the same ones, of
their own. Any difference refuses the match.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ringfx.ir.tiles import Expr, TileIndex, evaluate
from ringfx.passes.axes.arrangement import Arrangement
from ringfx.passes.axes.call import Call
from ringfx.passes.axes.space import Dim
from ringfx.passes.detect.candidate import Candidate, Operand, Region
from ringfx.passes.detect.names import BROADCASTS, VIEWS, Factor
from ringfx.passes.detect.products import Product
from ringfx.passes.detect.trial_sizes import Resized, small_sizes
from ringfx.torch_compat.dispatch import disable_current_modes
from ringfx.torch_compat.fake_tensors import unset_fake_temporarily

__all__ = ["Claim", "difference", "structure"]

aten = torch.ops.aten
Tensor = torch.Tensor
TOLERANCE = 1e-6
"""Casts inside a mask's expression round to float32."""
PERMUTES = frozenset({
    aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default,
    aten.t.default, aten.mT.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist,
    aten.moveaxis.int, aten.moveaxis.intlist, aten.unsqueeze.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default,
})  # fmt: skip
"""Views whose arguments name dimensions, not sizes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Claim:
    """The arguments of the canonical operator, to be proved."""

    products: Mapping[int, float]
    factors: Mapping[int, tuple[Expr, ...]]
    cap: float | None
    score_map: Expr | None
    bias: Expr | None
    keep: Expr | None
    slope: Expr | None
    sinks: Expr | None
    fully_masked: str
    captured: tuple[torch.dtype, ...]
    """Types of the tensors that the expressions read."""
    binary: bool
    """Whether these are masks of 0 and 1, by which something huge is multiplied."""
    entering: Mapping[Node, Expr]
    """The values that the scores read, lifted; by the same captured tensors as bias and keep."""
    factor_operands: Mapping[int, tuple[tuple[bool, Operand], ...]]
    """For each factor of a product whether keys are multiplied with it, and how it is arranged."""


def difference(candidate: Candidate, claim: Claim) -> float:
    """How far the region's result is from the canonical form's, relative to its largest element."""
    assert candidate.region is not None, "only spelled-out attention has a region"
    with unset_fake_temporarily(), disable_current_modes(), torch.no_grad():
        trial = _Trial(candidate, candidate.region, claim)
        ours, theirs = trial.canonical(), trial.as_written()
    if ours.shape != theirs.shape:
        return math.inf
    rows = ~torch.isnan(ours)
    if not torch.equal(torch.isnan(theirs) & rows, torch.zeros_like(rows)):
        return math.inf
    if claim.fully_masked == "nan" and not torch.equal(torch.isnan(theirs), ~rows):
        return math.inf
    distance = (ours - theirs).masked_fill(~rows, 0.0).abs().max()
    largest = theirs.masked_fill(~rows, 0.0).abs().max().clamp(min=1.0)
    return float(distance / largest)


class _Trial:
    """One run of both forms on the same values."""

    def __init__(self, candidate: Candidate, region: Region, claim: Claim) -> None:
        self.candidate, self.region, self.claim = candidate, region, claim
        self._generator = torch.Generator().manual_seed(0)
        self._sizes = small_sizes(candidate, region)
        self._resized = Resized(candidate, self._sizes)
        self._sources = [
            tuple(self._random(f.dims[f.source]) for f in pair) for pair in region.factors
        ]
        self._index = self._tile()
        self._noise: Any = [
            _Noise(i, dtype, claim.binary) for i, dtype in enumerate(claim.captured)
        ]
        self._kept = self._drawn()

    def _read(self, expr: Expr, index: TileIndex | None = None) -> Tensor:
        return evaluate(self._resized(expr), index or self._index, self._noise)

    def size(self, atom: int) -> int:
        return self._sizes[atom]

    def shape(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(math.prod(self.size(a) for a in dim) for dim in dims)

    def canonical(self) -> Tensor:
        candidate, claim = self.candidate, self.claim
        total: Tensor | None = None
        for i, scale in claim.products.items():
            q, k = (self._operand(o[i], i) for o in (candidate.q, candidate.k))
            for factor, (of_keys, operand) in zip(
                claim.factors.get(i, ()), claim.factor_operands.get(i, ()), strict=True
            ):
                value = self._arranged(self._entered(operand.value), operand.arrangement)
                value = value.reciprocal() if factor[0] == "reciprocal" else value
                q, k = (q, k * value) if of_keys else (q * value, k)
            part = scale * q @ _grouped(k, q).transpose(-1, -2)
            total = part if total is None else total + part
        assert total is not None, "there is a product"
        scores = total if claim.cap is None else claim.cap * torch.tanh(total / claim.cap)
        if claim.score_map is not None:
            scores = self._read(claim.score_map, replace(self._index, score=scores))
        if claim.slope is not None:
            scores = scores.masked_fill(self._read(claim.slope) == 0, 0.0)
        if claim.bias is not None:
            scores = scores + self._read(claim.bias)
        keep = torch.ones((), dtype=torch.bool)
        if claim.keep is not None:
            keep = self._read(claim.keep).bool()
        v = self._operand(candidate.v, -1)
        weights = _weights(scores, keep.expand(scores.shape), self._sinks(scores), claim)
        if self._kept is not None:
            weights = weights * self._kept
        return self._arranged(weights @ _grouped(v, scores), candidate.result)

    def as_written(self) -> Tensor:
        env: dict[Node, Any] = {}
        products = {p.call: (p, i) for i, p in enumerate(self.region.products)}
        drops = {drop.result: drop for drop in self.region.drops}
        drawn = {n for drop in self.region.drops for n in drop.calls} - set(drops)
        for node in self.region.nodes:
            if node in drawn:
                continue
            if node in drops:
                env[node] = self._dropped(env[drops[node].weights], self.region.dims[node][0])
            elif node in products:
                product, i = products[node]
                env[node] = self._product(product, i, env)
            else:
                env[node] = self._call(node, self.region.dims.get(node, ((),)), env)
        result: Tensor = env[self.candidate.node]
        return result

    def _product(self, product: Product, i: int, env: dict[Node, Any]) -> Tensor:
        last = i == len(self.region.products) - 1
        given: list[Tensor] = []
        for side in (0, 1):
            factor = self.region.factors[i][side]
            weights = last and side == self.region.side
            given.append(env[factor.node] if weights else self._chained(factor, i, side))
        places = dict(zip(product.places, given, strict=True))
        operands = [
            places[n] if n in places else self._value(v, env)
            for n, v in enumerate(Call(product.call).operands)
        ]
        made: Tensor = _called(product.call, operands)
        return made

    def _chained(self, factor: Factor, i: int, side: int) -> Tensor:
        env: dict[Node, Any] = {factor.source: self._sources[i][side]}
        for view in factor.chain:
            env[view] = self._call(view, (factor.dims[view],), env)
        value: Tensor = env[factor.node]
        return value

    def _call(self, node: Node, dims: tuple[tuple[Dim, ...], ...], env: Mapping[Node, Any]) -> Any:
        if node.target is operator.getitem:
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        operands = [self._value(n, env) for n in Call(node).operands]
        shape = self.shape(dims[0])
        if node.target is aten.slice.Tensor:
            return self._cropped(node, operands[0], shape)
        if node.target in BROADCASTS:
            return _repeated(node, operands[0], shape)
        if node.target in VIEWS - PERMUTES:
            return operands[0].reshape(shape)
        return _called(node, operands)

    def _drawn(self) -> Tensor | None:
        """Which weights are kept, [batch, heads, queries, keys]; the mean of none is changed."""
        region = self.region
        if not any(drop.keeps < 1 for drop in region.drops):
            return None
        if any(self.region.joined & {a for dim in region.dims[drop.result][0] for a in dim}
               for drop in region.drops):  # fmt: skip
            return None  # a column beside the keys is there: it is cut off later
        shape = self.shape(self._tile_dims())
        return (torch.rand(shape, generator=self._generator) > 0.3).double()

    def _dropped(self, weights: Tensor, dims: tuple[Dim, ...]) -> Tensor:
        """The weights after a step that drops some: those that the canonical form drops."""
        if self._kept is None:
            return weights
        atoms = [a for dim in self._tile_dims() for a in dim]
        kept = self._kept.reshape([self.size(a) for a in atoms])
        given = tuple((a,) for a in atoms)
        return weights * self._arranged(kept, Arrangement(given=given, wanted=dims))

    def _tile_dims(self) -> tuple[Dim, ...]:
        """Batch, heads, queries and keys."""
        keys = self.candidate.k[0].arrangement.wanted[2]
        return (*self.candidate.q[0].arrangement.wanted[:3], keys)

    def _cropped(self, node: Node, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        at = Call(node).dim("dim", value.dim())
        start = 0 if (Call(node)["start"] or 0) == 0 else value.shape[at] - shape[at]
        return value.narrow(at, start, shape[at])

    def _value(self, node: Node, env: Mapping[Node, Any]) -> Tensor:
        if node not in env and node not in self.candidate.entering:
            return torch.zeros((), dtype=torch.float64)  # what beta = 0 ignores
        value: Tensor = env[node] if node in env else self._entered(node)
        return value

    def _entered(self, node: Node) -> Tensor:
        """A mask or bias as the calls take it, from its expression."""
        dims = self.candidate.entering[node]
        tile = self._tile_dims()
        value = self._read(self.claim.entering[node])
        value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
        value = value.expand(self.shape(tile)).reshape([self.size(a) for d in tile for a in d])
        present = {a for dim in dims for a in dim}
        index = tuple(slice(None) if a in present else 0 for d in tile for a in d)
        kept = tuple((a,) for d in tile for a in d if a in present)
        value = self._arranged(value[index], Arrangement(given=kept, wanted=dims))
        return value.double() if value.is_floating_point() else value

    def _operand(self, operand: Operand, i: int) -> Tensor:
        pair, values = self.region.factors[i], self._sources[i]
        side = next(
            s for s in (0, 1)
            if pair[s].source is operand.value
            and tuple(pair[s].dims[pair[s].source]) == operand.arrangement.given
        )  # fmt: skip
        return self._arranged(values[side], operand.arrangement)

    def _sinks(self, scores: Tensor) -> Tensor | None:
        if self.claim.sinks is None:
            return None
        value = self._read(self.claim.sinks).double()
        value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
        return value[..., :1].expand(*scores.shape[:3], 1)

    def _arranged(self, value: Tensor, arrangement: Arrangement) -> Tensor:
        steps = arrangement.steps(self.size)
        for method, argument in (
            (torch.reshape, steps.split), (torch.permute, steps.order),
            (torch.reshape, steps.spaced), (torch.Tensor.expand, steps.expanded),
            (torch.reshape, steps.merged),
        ):  # fmt: skip
            if argument is not None:
                value = method(value, argument)
        return value

    def _random(self, dims: Sequence[Dim]) -> Tensor:
        return torch.randn(self.shape(dims), generator=self._generator, dtype=torch.float64)

    def _tile(self) -> TileIndex:
        return TileIndex(*map(torch.arange, self.shape(self._tile_dims())))


class _Noise:
    """A tensor of any shape whose elements are functions of their index."""

    def __init__(self, seed: int, dtype: torch.dtype, binary: bool) -> None:
        self._seed, self._dtype, self._binary = seed, dtype, binary

    def __getitem__(self, places: tuple[Tensor, ...]) -> Tensor:
        mixed = torch.full((), float(self._seed), dtype=torch.float64)
        for i, place in enumerate(places):
            mixed = mixed * 1.618 + torch.as_tensor(place).double() * (12.9898 + 7.233 * i)
        unit = (torch.sin(mixed + 0.5) * 43758.5453) % 1.0
        if self._dtype == torch.bool:
            return unit > 0.3
        if not self._dtype.is_floating_point:
            return (unit * 2).long() if self._binary else (unit * 3).long()
        return (unit > 0.3).double() if self._binary else unit * 2 - 1


def _weights(scores: Tensor, keep: Tensor, sinks: Tensor | None, claim: Claim) -> Tensor:
    masked = scores.masked_fill(~keep, -math.inf)
    if sinks is not None:
        return torch.softmax(torch.cat([masked, sinks], -1), -1)[..., :-1]
    weights = torch.softmax(masked, -1)  # NaN where nothing is kept
    empty = ~keep.any(-1, keepdim=True)
    if claim.fully_masked in ("mean", "absorbed"):
        weights = weights.masked_fill(empty, 1 / scores.shape[-1])
    return weights


def _grouped(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _called(node: Node, operands: Sequence[Tensor]) -> Any:
    """The call on other tensors, computing in float64."""
    rest = iter(operands)
    tensors = set(Call(node).operands)
    args, kwargs = torch.fx.node.map_arg(
        (node.args, node.kwargs), lambda n: next(rest) if n in tensors else n
    )

    def wide(value: Any) -> Any:
        floating = isinstance(value, torch.dtype) and value.is_floating_point
        return torch.float64 if floating else torch.device("cpu") if _is_device(value) else value

    result = node.target(*map(wide, args), **{n: wide(v) for n, v in kwargs.items()})  # type: ignore[operator]
    return result


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device)


def _repeated(node: Node, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if node.target is aten.repeat_interleave.self_int:
        at = Call(node).dim("dim", value.dim())
        return value.repeat_interleave(shape[at] // value.shape[at], at)
    if node.target is aten.repeat.default:
        own = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
        return value.repeat([s // o for s, o in zip(shape, own, strict=True)])
    return value.expand(shape)


def structure(candidate: Candidate, claim: Claim) -> Hashable:
    """Equal for layers of the same structure: one proof serves them all."""
    region = candidate.region
    assert region is not None, "only spelled-out attention has a region"
    numbers: dict[Node, int] = {}
    axes: dict[int, int] = {}

    def frozen(value: Any) -> Hashable:
        if isinstance(value, Node):
            return ("node", numbers.setdefault(value, len(numbers)))
        if isinstance(value, (tuple, list)):
            return tuple(frozen(v) for v in value)
        return str(value)

    def named(dims: Sequence[Dim]) -> Hashable:
        return tuple(tuple(axes.setdefault(a, len(axes)) for a in dim) for dim in dims)

    calls = tuple(
        (str(n.target), frozen(n.args), frozen(sorted(n.kwargs.items())),
         tuple(named(d) for d in region.dims.get(n, ())))
        for n in region.nodes
    )  # fmt: skip
    chains = tuple(
        (tuple(str(n.target) + str(frozen(n.args)) for n in f.chain), named(f.dims[f.source]))
        for pair in region.factors for f in pair
    )  # fmt: skip
    operands = (*candidate.q, *candidate.k, candidate.v)
    arranged = tuple((named(o.arrangement.given), named(o.arrangement.wanted)) for o in operands)
    claimed = (
        tuple(claim.products.items()), tuple(claim.factors.items()), claim.cap, claim.score_map,
        claim.bias, claim.keep,
        claim.slope, claim.sinks, claim.fully_masked, tuple(claim.entering.values()),
    )  # fmt: skip
    return repr((calls, chains, arranged, named(candidate.result.wanted), claimed))
