"""Attention by its axes: contract(d), elementwise over (.., q, k), normalise k, contract(k)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.fx import Node

from ringfx.passes.capture.origin import inlined_call
from ringfx.passes.detect.candidate import Candidate, NearMiss, Region
from ringfx.passes.detect.channels import is_over_channels
from ringfx.passes.detect.names import Factor, Names
from ringfx.passes.detect.products import Product
from ringfx.passes.detect.program import Program
from ringfx.passes.detect.region import Named, check_gradients, check_users, name_region
from ringfx.passes.detect.roles import Pair, Refused, Roles, assign
from ringfx.passes.detect.scores import ScoreReader
from ringfx.passes.detect.softmax import Softmax, softmax_call
from ringfx.passes.detect.walk import (
    ScoreOperands,
    ValueProduct,
    op_name,
    walk_to_products,
    walk_to_value_product,
)

__all__ = ["find_eager"]


def find_eager(node: Node, program: Program) -> Candidate | NearMiss | None:
    """The attention whose softmax this call is; a near miss; or None for another softmax."""
    found = softmax_call(node)
    if found is None:
        return None
    behind = walk_to_products(found.scores, program.parameters)
    ahead = walk_to_value_product(found)
    if not behind.products:
        return _no_product(behind, ahead)
    if not isinstance(ahead, ValueProduct):
        return ahead
    alone = partial(_by_one_product, program, found, behind, ahead)
    try:
        candidate = _candidate(program, found, behind, ahead)
    except Refused as refused:
        return next(iter(alone()), NearMiss(str(refused)))
    return replace(candidate, otherwise=alone) if len(candidate.q) > 1 else candidate


def _by_one_product(
    program: Program, found: Softmax, behind: ScoreOperands, ahead: ValueProduct
) -> Sequence[Candidate]:
    """Readings with one product as the scores, the one that would take most memory first."""
    if len(behind.products) < 2:
        return ()
    readings = []
    for product in sorted(behind.products, key=_elements, reverse=True):
        with contextlib.suppress(Refused):
            one = replace(behind, products=(product,))
            readings.append(_candidate(program, found, one, ahead))
    return readings


def _elements(product: Product) -> int:
    value: torch.Tensor = product.node.meta["val"]
    return value.numel()


def _no_product(behind: ScoreOperands, ahead: ValueProduct | NearMiss | None) -> NearMiss | None:
    """A softmax of something else than products of two values."""
    if not isinstance(ahead, ValueProduct):
        return None
    if behind.stopped:
        return NearMiss(f"between its product and its softmax stands {op_name(behind.stopped[0])}")
    if not behind.projections:
        return None
    return NearMiss(
        "its scores are a projection of one value, not products of queries with keys (a learned "
        "query that pools, a gate, mixed heads or linear attention)"
    )


def _candidate(
    program: Program, found: Softmax, behind: ScoreOperands, ahead: ValueProduct
) -> Candidate:
    named, inside = _named(program, found, behind, ahead)
    check_users(named, ahead.result)
    check_gradients(named, {n for drop in ahead.drops for n in drop.drawn})
    pairs = [_pair(named, p) for p in named.products]
    if all(p.k.source in program.learned for p in pairs):
        raise Refused("its keys are parameters: a memory that each query reads alone")
    v = named.factors[ahead.product.node][1 - ahead.side]
    roles = _roles(program, named, pairs, ahead)
    reader = ScoreReader(named, roles, inside)
    scores = reader.softmax(found)
    return Candidate(
        node=ahead.result,
        found_by=inlined_call(ahead.result) or "eager",
        q=tuple(roles.q(p.q, named.source(p.q), i) for i, p in enumerate(pairs)),
        k=tuple(roles.k(p.k, named.source(p.k), i) for i, p in enumerate(pairs)),
        v=roles.v(v, named.source(v)),
        result=roles.result(named.names.dims(ahead.result)),
        sizes=roles.sizes,
        scores=scores,
        values=tuple(reader.captured),
        read=dict(reader.read),
        entering={n: named.names.dims(n) for n in reader.captured},
        sinks=reader.sinks,
        fully_masked="zero" if ahead.zeroed else found.masked,
        dropout=ahead.dropout,
        region=_region(named, ahead),
        in_windows=roles.in_windows,
        over_channels=is_over_channels(program, named.names, roles),
    )


def _named(
    program: Program, found: Softmax, behind: ScoreOperands, ahead: ValueProduct
) -> tuple[Named, Sequence[Node]]:
    """The region of those products that are of queries with keys; others are biases."""
    products: Sequence[Product] = behind.products
    while True:
        inside = behind.inside(products, program.order)
        try:
            named = name_region(Names(program.axes), products, inside, found, ahead, program.order)
        except Refused:
            followed = [p for p in products if _is_followed(program, found, behind, ahead, p)]
            if len(followed) in (0, len(products)):
                raise
            products = followed
            continue
        kept = [p for p in products if named.pair(p) is not None]
        if not kept:
            raise Refused(_no_pair(named))
        if len(kept) == len(products):
            return named, inside
        products = kept


def _is_followed(
    program: Program, found: Softmax, behind: ScoreOperands, ahead: ValueProduct, product: Product
) -> bool:
    """Whether one product's way to the softmax can be named, and it is of queries with keys.

    A product that is shifted before it is added (relative positions) is a bias beside the others.
    """
    inside = behind.inside([product], program.order)
    try:
        named = name_region(Names(program.axes), [product], inside, found, ahead, program.order)
    except Refused:
        return False
    return named.pair(product) is not None


def _no_pair(named: Named) -> str:
    keys = set(named.keys)
    if not keys:
        return "it has one key"
    for product in named.products:
        factors = [{a for d in named.source(f) for a in d} for f in named.factors[product.node]]
        if all(keys & atoms for atoms in factors):
            return (
                "its softmax runs over an axis that queries and keys share (heads or batch), not "
                "over keys"
            )
        if any(keys & atoms for atoms in factors):
            return "its queries have no token axis: one query pools all keys"
    return "its softmax does not run over the keys of a product"


def _pair(named: Named, product: Product) -> Pair:
    pair = named.pair(product)
    assert pair is not None, "products without queries and keys were left out"
    return pair


def _roles(program: Program, named: Named, pairs: Sequence[Pair], ahead: ValueProduct) -> Roles:
    every = [a for dim in named.scores for a in dim]
    if len(set(every)) != len(every):
        raise Refused("two axes of its scores are one (scores added to their transpose)")
    weights, v = (named.factors[ahead.product.node][i] for i in (ahead.side, 1 - ahead.side))
    result = {a for dim in named.names.dims(ahead.product.node) for a in dim}
    summed = {a for f in (weights, v) for dim in named.source(f) for a in dim} - result
    if summed != set(named.keys):
        raise Refused(
            "its softmax normalises one axis and its values are summed over another (softmax over "
            "queries or heads, slot attention, mixed heads)"
        )
    for pair in pairs:
        have = {a for f in (pair.q, pair.k) for dim in named.source(f) for a in dim}
        contracted = have - set(every)
        sides = [{a for dim in named.source(f) for a in dim} for f in (pair.q, pair.k)]
        if not contracted <= sides[0] & sides[1]:
            raise Refused("a factor of its scores is summed on its own")
    return assign(named.names, program, pairs, v, named.scores, named.keys)


def _region(named: Named, ahead: ValueProduct) -> Region:
    resolved = named.names.resolved
    products = (*named.products, ahead.product)

    def settled(factor: Factor) -> Factor:
        return replace(factor, dims={n: resolved(d) for n, d in factor.dims.items()})

    return Region(
        nodes=named.nodes,
        dims={n: tuple(map(resolved, values)) for n, values in named.names.values.items()},
        products=products,
        factors=tuple(
            (settled(named.factors[p.node][0]), settled(named.factors[p.node][1])) for p in products
        ),
        side=ahead.side,
        drops=ahead.drops,
        joined=frozenset(
            a for join in named.joins.values() for a in named.names.space.resolve(join.joined)
        ),
    )
