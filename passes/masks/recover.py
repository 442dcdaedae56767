"""Put each attention into canonical form, its mask as a tile function."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.errors import InvalidArgument
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.tiles import Box, Expr
from ringfx.ir.values import AttentionSite, Captured, Declined, Sites
from ringfx.ops import attention
from ringfx.ops.kernels.dropout import SEEDS
from ringfx.passes.axes.arrangement import Arrangement
from ringfx.passes.axes.call import given_input
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.simplify import eliminate_dead
from ringfx.passes.detect.candidate import Candidate, Detected, Operand, decline
from ringfx.passes.detect.names import BROADCASTS, VIEWS
from ringfx.passes.detect.prove import TOLERANCE, Claim, difference, structure
from ringfx.passes.detect.softmax import CASTS
from ringfx.passes.exprs.buffers import Buffers
from ringfx.passes.exprs.emitter import Emitter
from ringfx.passes.exprs.lift import Index, Lifter, Lifters, lifted, renumbered
from ringfx.passes.exprs.structure import first_of_equals
from ringfx.passes.masks.cut import Cuts, cut_to_rows
from ringfx.passes.masks.decompose import CanonicalScores, decompose
from ringfx.passes.masks.factors import has_threshold
from ringfx.passes.masks.merge_rows import merge_rows, split_heads
from ringfx.passes.masks.score_terms import Unrepresentable
from ringfx.strategies import DEFAULT

__all__ = ["recover"]

aten = torch.ops.aten
Proofs: TypeAlias = dict[Hashable, float]
"""For each structure of an attention, how far its canonical form is from it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Recovered:
    """What a candidate computes, as the canonical operator takes it."""

    scores: CanonicalScores
    captured: Sequence[Node]
    """What the tile functions read."""
    sinks: Node | float | None
    spec: AttentionSpec


def recover(captured: Captured, detected: Detected) -> Sites:
    """Replace every detected attention by the canonical operator.

    Guarantee: the program still computes the same; no S x S mask is left that only attention read.
    A candidate whose scores have no canonical form is declined with its reason and left as it is.
    """
    _refuse_empty(detected)
    found: list[AttentionSite] = []
    refused: list[Declined] = []
    graph = captured.graph_module.graph
    buffers = Buffers.of(captured)
    lifters, proofs = Lifters(first_of_equals(graph), buffers), Proofs()
    cuts = Cuts(graph)
    place = {node: i for i, node in enumerate(graph.nodes)}
    # One may read another's result, whose softmax may come later than its own.
    for candidate in sorted(detected.candidates, key=lambda c: -place[c.node]):
        reading = _first_reading(candidate, lifters, proofs, cuts)
        if isinstance(reading, Unrepresentable):
            refused.append(decline(candidate.node, str(reading)))
            continue
        node = _replace(graph, *reading)
        found.append(_site(node, reading[0].found_by, reading[1].spec))
    for node in detected.written:
        found.append(_site(node, "ringfx", AttentionSpec.from_json(str(node.kwargs["spec"]))))
    _drop_dead_masks(captured.graph_module)
    inputs = graph.find_nodes(op="placeholder")
    read = tuple(i for i, node in enumerate(inputs) if node in buffers.read)
    missed = tuple(i for i, node in enumerate(inputs) if node in buffers.missed)
    declined = (*detected.declined, *reversed(refused))
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    found.sort(key=lambda site: order[site.node])
    return Sites(found=tuple(found), declined=declined, buffers=read, unvalued=missed)


def _first_reading(
    candidate: Candidate, lifters: Lifters, proofs: Proofs, cuts: Cuts
) -> tuple[Candidate, _Recovered] | Unrepresentable:
    """The first reading of a candidate that has a canonical form; else why the first has none."""

    def read(reading: Candidate) -> tuple[Candidate, _Recovered]:
        return reading, _recover(reading, lifters.of(_box(reading)), proofs, cuts)

    try:
        return read(candidate)
    except Unrepresentable as reason:
        first = reason
    for other in candidate.otherwise():
        with contextlib.suppress(Unrepresentable):
            return read(other)
    return first


def _refuse_empty(detected: Detected) -> None:
    for candidate in detected.candidates:
        q_len, kv_len = (candidate.shape(x)[2] for x in (candidate.q[0], candidate.k[0]))
        if not q_len or not kv_len:
            raise InvalidArgument(
                f"{describe_node(candidate.node)}: attention of {q_len} queries over {kv_len} "
                "keys: the sequence is empty, and there is nothing to split. Do: skip empty "
                "batches, or give them to the model that was passed to ringfx.optimize."
            )


def _box(candidate: Candidate) -> Box:
    """The ranges of the score tensor's indices."""
    batch, heads, q_len = candidate.shape(candidate.q[0])[:3]
    return Box(b=(0, batch), h=(0, heads), q=(0, q_len), k=(0, candidate.length(candidate.k[0])))


def _recover(candidate: Candidate, lifter: Lifter, proofs: Proofs, cuts: Cuts) -> _Recovered:
    q_len, kv_len = candidate.length(candidate.q[0]), candidate.length(candidate.k[0])
    scores = decompose(
        candidate.scores, lifter, candidate.values, q_len=q_len, kv_len=kv_len,
        empty_row=candidate.fully_masked,
    )  # fmt: skip
    _prove(candidate, scores, lifter, proofs)
    lifted_exprs = (scores.keep, scores.bias, scores.score_map, scores.slope)
    exprs, captured = renumbered(lifted_exprs, lifter.captured)
    exprs, captured = split_heads(cuts, exprs, captured, heads=_heads(candidate))
    exprs, captured = merge_rows(cuts, exprs, captured, q_len=q_len)
    exprs, captured = cut_to_rows(cuts, exprs, captured, q_len=q_len, kv_len=kv_len)
    keep, bias, score_map, slope = exprs
    sinks = None if candidate.sinks is None else _sinks(candidate, candidate.sinks)
    spec = AttentionSpec(
        scale=next(iter(scores.products.values())),
        q_len=q_len,
        kv_len=kv_len,
        keep=keep,
        bias=bias,
        soft_cap=scores.cap,
        score_map=score_map,
        dropout=candidate.dropout,
        sinks=sinks is not None,
        fully_masked="zero" if sinks is not None else scores.fully_masked,
        slope=slope,
    )
    return _Recovered(scores=scores, captured=captured, sinks=sinks, spec=spec)


class _Viewed(Lifter):
    """Looks through views only, and computes nothing itself."""

    def is_lifted(self, value: Node) -> bool:
        return value.target in VIEWS | BROADCASTS | CASTS and super().is_lifted(value)

    def _lift(self, node: Node, index: Index) -> Expr:
        return super()._lift(node, index) if self.is_lifted(node) else self.capture(node, index)


def _sinks(candidate: Candidate, read: Expr) -> Node | float:
    """The value that holds a logit for each head or one for all, or one number for all."""
    for lifter in (Lifter(), _Viewed()):
        expr = lifted(read, lifter, candidate.values)
        while expr[0] in ("float", "double", "half", "bfloat16"):
            expr = expr[1]
        if expr[0] == "const":
            return float(expr[1])
        if expr[0] == "at" and all(e in (("h",), ("const", 0)) for e in expr[2:]):
            found = lifter.captured[expr[1]]
            if found.meta["val"].numel() == (_heads(candidate) if ("h",) in expr else 1):
                return found
    raise Unrepresentable("its attention sink is not one logit per head")


def _heads(candidate: Candidate) -> int:
    return candidate.shape(candidate.q[0])[1]


def _replace(graph: torch.fx.Graph, candidate: Candidate, recovered: _Recovered) -> Node:
    old = candidate.node
    emit = Emitter(graph, old)
    scores, spec = recovered.scores, recovered.spec
    q_parts, k_parts = [], []
    for i, scale in scores.products.items():
        q, k = (_operand(emit, candidate, o[i]) for o in (candidate.q, candidate.k))
        for factor in scores.factors.get(i, ()):
            q, k = _multiplied(emit, candidate, i, factor, q, k)
        q_parts.append(emit.scale(q, scale / spec.scale))
        k_parts.append(k)
    q, k, v = emit.join(q_parts), emit.join(k_parts), _operand(emit, candidate, candidate.v)
    dtype = _common_dtype(q, k, v)
    mixed = any(x.meta["val"].dtype != dtype for x in (q, k, v))
    q, k, v = (emit.cast(x, dtype) for x in (q, k, v))
    inputs = [*recovered.captured, *_sink_input(emit, recovered.sinks, q)]
    inputs += [_seed(emit, q)] if spec.dropout else []
    shape = (*q.meta["val"].shape[:-1], v.meta["val"].shape[-1])
    # Operands of one type and a result of another: autocast, which the operator obeys as well.
    made = dtype if mixed else old.meta["val"].dtype
    new = emit.call(
        attention, q, k, v, inputs, spec=spec.to_json(), strategy=DEFAULT,
        layout="contiguous", group="", name=old.meta.get("ringfx_path", ""),
        value=q.meta["val"].new_empty(shape, dtype=made),
    )  # fmt: skip
    result = emit.arrange(new, candidate.result, candidate.sizes)
    result = emit.cast(result, old.meta["val"].dtype)
    old.replace_all_uses_with(result)
    _erase(graph, candidate)
    return new


def _erase(graph: torch.fx.Graph, candidate: Candidate) -> None:
    """Take out the calls that the operator stands for, a dropout among them as well."""
    nodes = (candidate.node,) if candidate.region is None else candidate.region.nodes
    for node in reversed(nodes):
        graph.erase_node(node)


def _operand(emit: Emitter, candidate: Candidate, operand: Operand) -> Node:
    return emit.arrange(operand.value, operand.arrangement, candidate.sizes)


def _multiplied(
    emit: Emitter, candidate: Candidate, i: int, factor: Expr, q: Node, k: Node
) -> tuple[Node, Node]:
    """Scores times a value of queries or of keys: the queries or keys times it."""
    of_keys, operand = _factor(candidate, i, factor)
    value = _operand(emit, candidate, operand)
    meets = aten.div.Tensor if factor[0] == "reciprocal" else aten.mul.Tensor
    if of_keys:
        return q, emit.call(meets, k, value)
    return emit.call(meets, q, value), k


def _factor(candidate: Candidate, i: int, factor: Expr) -> tuple[bool, Operand]:
    """Whether keys are multiplied with a factor of the scores, and how it is arranged."""
    read = factor[1] if factor[0] == "reciprocal" else factor
    value = candidate.values[read[1]]
    dims = candidate.entering[value]
    present = {a for dim in dims for a in dim}
    of_keys = bool(present & set(candidate.k[i].arrangement.wanted[2]))
    roles = (candidate.k if of_keys else candidate.q)[i].arrangement.wanted[:3]
    wanted = tuple(role if present & set(role) else () for role in roles)
    arrangement = Arrangement(given=dims, wanted=(*wanted, ()))
    if not arrangement.is_permutation:
        raise Unrepresentable("its scores are multiplied by a value of keys and query heads")
    return of_keys, Operand(value=value, arrangement=arrangement)


def _prove(candidate: Candidate, scores: CanonicalScores, lifter: Lifter, proofs: Proofs) -> None:
    """Hold the canonical form against the calls as they stand, once for each structure."""
    if candidate.region is None:
        return
    entering = {n: lifted(e, lifter, candidate.values) for n, e in candidate.read.items()}
    sinks = None if candidate.sinks is None else lifted(candidate.sinks, lifter, candidate.values)
    claim = Claim(
        products=scores.products, factors=scores.factors, cap=scores.cap,
        score_map=scores.score_map, bias=scores.bias, keep=scores.written, slope=scores.slope,
        sinks=sinks, fully_masked=scores.fully_masked,
        captured=tuple(n.meta["val"].dtype for n in lifter.captured),
        binary=has_threshold(scores.written), entering=entering,
        factor_operands={
            i: tuple(_factor(candidate, i, f) for f in factors)
            for i, factors in scores.factors.items()
        },
    )  # fmt: skip
    key = structure(candidate, claim)
    if key not in proofs:
        proofs[key] = difference(candidate, claim)
    if not proofs[key] <= TOLERANCE:
        raise Unrepresentable(
            f"its canonical form differs from it by {proofs[key]:.1e} on random values. "
            "Do: report this with the model."
        )


def _common_dtype(*values: Node) -> torch.dtype:
    dtype: torch.dtype = values[0].meta["val"].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.meta["val"].dtype)
    return dtype


def _sink_input(emit: Emitter, sinks: Node | float | None, q: Node) -> list[Node]:
    if sinks is None:
        return []
    heads = q.meta["val"].shape[1]
    if isinstance(sinks, float):
        like = q.meta["val"]
        return [emit.call(aten.full.default, [heads], sinks, dtype=like.dtype, device=like.device,
                          value=like.new_empty((heads,)))]  # fmt: skip
    if tuple(sinks.meta["val"].shape) == (heads,):
        return [sinks]
    if sinks.meta["val"].numel() == 1:
        alone = emit.call(aten.reshape.default, sinks, [1])
        return [emit.call(aten.expand.default, alone, [heads])]
    return [emit.call(aten.reshape.default, sinks, [heads])]


def _seed(emit: Emitter, q: Node) -> Node:
    """One number that the model's generator draws: what is dropped follows from it and from places,
    wherever they are computed. It is kept for a recompute, which must drop the same."""
    like: torch.Tensor = q.meta["val"]
    seed = emit.call(
        aten.randint.low, 0, SEEDS, [1], dtype=torch.int64, device=like.device,
        value=like.new_empty((1,), dtype=torch.int64),
    )  # fmt: skip
    if "recompute" in seed.meta:
        seed.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return seed


def _site(node: Node, found_by: str, spec: AttentionSpec) -> AttentionSite:
    q, k, v = (a.meta["val"] for a in node.args[:3])  # type: ignore[union-attr]
    read: Any = node.args[3]
    matrices = set(tiles.matrices(*spec.functions))
    rows = set(tiles.rows_read(*spec.functions))
    made = {i for i in rows if given_input(read[i]) is None}
    return AttentionSite(
        node=node.name,
        name=node.meta.get("ringfx_path", ""),
        source=node.meta.get("ringfx_source", ""),
        found_by=found_by,
        spec=spec,
        mask_words=spec.words,
        density=spec.density,
        balanced=spec.is_balanced,
        batch=int(q.shape[0]),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        head_dim=int(q.shape[-1]),
        v_head_dim=int(v.shape[-1]),
        dtype=str(q.dtype).removeprefix("torch."),
        device=q.device.type,
        trains=needs_grad(node),
        checkpoint=node.meta.get("ac_graph_id", 0),
        matrix_bytes=_num_bytes(read[i] for i in matrices - made),
        taken_bytes=_num_bytes(read[i] for i in (matrices - made) & rows),
        row_bytes=_num_bytes(read[i] for i in made),
    )


def _num_bytes(nodes: Iterable[Node]) -> int:
    values: list[torch.Tensor] = [node.meta["val"] for node in nodes]
    return sum(value.numel() * value.element_size() for value in values)


def _drop_dead_masks(gm: torch.fx.GraphModule) -> None:
    eliminate_dead(gm.graph)
    gm.recompile()
