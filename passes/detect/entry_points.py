"""Calls that are attention by name, one row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from ringfx.ir.tiles import CAUSAL, Expr
from ringfx.passes.axes.call import Call
from ringfx.passes.axes.space import AxisClash, Dim
from ringfx.passes.capture.origin import inlined_call
from ringfx.passes.detect.candidate import Candidate, NearMiss, score
from ringfx.passes.detect.channels import is_over_channels
from ringfx.passes.detect.inline_kernel_calls import KernelCall
from ringfx.passes.detect.kernel_calls import KERNEL_CALLS, folded, is_plain
from ringfx.passes.detect.names import Factor, Names
from ringfx.passes.detect.program import Program
from ringfx.passes.detect.roles import Refused, Roles

__all__ = ["ENTRY_POINTS", "other_form"]

aten = torch.ops.aten
MINUS_INF: Expr = ("const", -math.inf)


def scaled_dot_product(node: Node, program: Program) -> Candidate | NearMiss:
    call = Call(node)
    q, k = call.shape("query"), call.shape("key")
    if not is_plain(q, k, call.shape("value")):
        return NearMiss(f"its operands {tuple(q)}, {tuple(k)} have heads that do not divide")
    if call["dropout_p"] >= 1:
        return NearMiss("its dropout drops all of its weights")
    names = Names(program.axes)
    factors = tuple(names.factor(call[n]) for n in ("query", "key", "value"))
    try:
        roles = _roles(names, factors)
        mask = call["attn_mask"]
        scale: Any = call["scale"]
        default = 1 / math.sqrt(q[-1] or 1)  # without head dims every score is 0
        scores = _scores(roles, call, default if scale is None else float(scale))
    except (AxisClash, Refused) as refused:
        return NearMiss(str(refused))
    q_source, k_source, v_source = ((f, names.resolved(f.dims[f.source])) for f in factors)
    return Candidate(
        node=node,
        found_by=_found_by(node),
        q=(roles.q(*q_source, 0),),
        k=(roles.k(*k_source, 0),),
        v=roles.v(*v_source),
        result=roles.result(_result(roles, len(q))),
        sizes=roles.sizes,
        scores=scores,
        values=() if mask is None else (mask,),
        dropout=float(call["dropout_p"]),
        over_channels=is_over_channels(program, names, roles),
    )


def _found_by(node: Node) -> str:
    name = inlined_call(node)
    return "sdpa" if name in (None, "scaled_dot_product_attention") else str(name)


def other_form(node: Node) -> KernelCall | None:
    """How a call of attention that is not plain SDPA is written as one."""
    if node.target is aten.scaled_dot_product_attention.default:
        call = Call(node)
        plain = is_plain(call.shape("query"), call.shape("key"), call.shape("value"))
        return None if plain else folded
    return KERNEL_CALLS.get(node.target)


def _roles(names: Names, factors: tuple[Factor, ...]) -> Roles:
    """Batch and heads by place, and which heads share a key."""
    q, k, v = (list(f.dims[f.node]) for f in factors)
    space = names.space
    for dims in (q, k, v):
        if len(dims) == 3:
            dims.insert(1, ())
    shared: Dim = ()
    if q[1] and k[1] and space.size(space.resolve(q[1])) != space.size(space.resolve(k[1])):
        kv_heads = space.size(space.resolve(k[1]))
        whole = space.size(space.resolve(q[1]))
        q[1], shared = space.regroup([q[1]], [kv_heads, whole // kv_heads])
    for a, b, dim in ((q, k, 0), (q, v, 0), (k, v, 0), (q, k, 1), (k, v, 1), (k, v, 2), (q, k, 3)):
        if a[dim] and b[dim]:
            space.unify(a[dim], b[dim])
    held = {a for f in factors[1:] for d in names.resolved(f.dims[f.source]) for a in d}
    every = space.resolve(q[1] or k[1] or v[1]) + space.resolve(shared)
    kv = tuple(a for a in every if a in held)
    batch = space.resolve(q[0] or k[0] or v[0])
    groups = tuple(a for a in every if a not in kv)
    queries, keys, width, values = map(space.resolve, (q[2], k[2], q[3], v[3]))
    atoms = {*batch, *every, *queries, *keys, *width, *values}
    return Roles(
        batch=batch, heads=kv + groups, kv_heads=kv, queries=queries, keys=keys,
        contracted=(width,), values=values, sizes={a: space.size((a,)) for a in atoms},
        spelled=every,
    )  # fmt: skip


def _scores(roles: Roles, call: Call, scale: float) -> Expr:
    scores: Expr = ("mul", score(), ("const", scale))
    mask = call["attn_mask"]
    if mask is not None:
        shape = mask.meta["val"].shape
        dims = [roles.batch, roles.spelled, roles.queries, roles.keys]
        if len(call.shape("query")) == 3:
            dims.pop(1)
        if len(shape) > len(dims):
            raise Refused(f"a mask of {len(shape)} dimensions for queries of {len(dims)}")
        own = dims[len(dims) - len(shape) :]
        read: Expr = (
            "at", 0, *roles.index([d if s != 1 else () for d, s in zip(own, shape, strict=True)])
        )  # fmt: skip
        boolean = mask.meta["val"].dtype == torch.bool
        scores = ("where", read, scores, MINUS_INF) if boolean else ("add", scores, read)
    return ("where", CAUSAL, scores, MINUS_INF) if call["is_causal"] else scores


def _result(roles: Roles, rank: int) -> tuple[Dim, ...]:
    heads = (roles.spelled,) if rank == 4 else ()
    return (roles.batch, *heads, roles.queries, roles.values)


ENTRY_POINTS: Mapping[object, Callable[[Node, Program], Candidate | NearMiss]] = {
    aten.scaled_dot_product_attention.default: scaled_dot_product,
}
