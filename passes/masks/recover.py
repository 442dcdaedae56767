"""Put each attention into canonical form, its mask as a tile function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx import tiles
from ringfx.ops import attention
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.simplify import eliminate_dead
from ringfx.passes.detect import Candidate, Detected
from ringfx.passes.detect.find import decline
from ringfx.passes.masks.lift import Index, Lifter
from ringfx.passes.masks.simplify import FALSE, TRUE, const, simplify
from ringfx.passes.values import AttentionSite, Captured, Declined, Sites
from ringfx.spec import AttentionSpec
from ringfx.tiles import Expr

__all__ = ["recover"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Mask:
    keep: Expr | None
    bias: Expr | None


def recover(captured: Captured, detected: Detected) -> Sites:
    """Replace every detected attention by the canonical operator.

    Guarantee: the program still computes the same; no S x S mask is left that only attention read.
    A candidate whose mask cannot be carried is declined with its reason and left as it stands.
    """
    found: list[AttentionSite] = []
    declined = list(detected.declined)
    for candidate in detected.candidates:
        answer = _canonicalize(captured.graph_module.graph, candidate)
        if isinstance(answer, Declined):
            declined.append(answer)
        else:
            found.append(answer)
    _drop_dead_masks(captured.graph_module)
    return Sites(found=tuple(found), declined=tuple(declined))


def _canonicalize(graph: torch.fx.Graph, candidate: Candidate) -> AttentionSite | Declined:
    lifter = Lifter()
    mask = _mask(candidate, lifter)
    learned = [n.name for n in lifter.captured if needs_grad(n)]
    if learned:
        return decline(
            candidate.node, f"its bias {learned[0]} is learned; no ring carries that yet"
        )
    spec = AttentionSpec(
        scale=candidate.scale,
        q_len=int(candidate.q.meta["val"].shape[-2]),
        kv_len=int(candidate.k.meta["val"].shape[-2]),
        keep=mask.keep,
        bias=mask.bias,
        dropout=candidate.dropout,
    )
    node = _replace(graph, candidate, lifter.captured, spec)
    return _site(candidate, node, spec)


def _mask(candidate: Candidate, lifter: Lifter) -> Mask:
    keep: Expr | None = None
    bias: Expr | None = None
    if candidate.mask is not None:
        lifted = lifter.aligned(candidate.mask, _index_of(candidate))
        if candidate.mask.meta["val"].dtype == torch.bool:
            keep = lifted
        else:
            keep, bias = _split_additive(lifted)
    if candidate.is_causal:
        keep = tiles.conjunction(keep, tiles.CAUSAL)
    return Mask(keep=None if keep == TRUE else keep, bias=bias)


def _index_of(candidate: Candidate) -> Index:
    """Index variables of the score tensor, outermost first."""
    rank = len(candidate.q.meta["val"].shape)
    if rank == 3:
        return (("b",), ("q",), ("k",))
    return (("b",), ("h",), ("q",), ("k",))


def _split_additive(expr: Expr) -> tuple[Expr | None, Expr | None]:
    """An additive mask as (kept, added): terms that are 0 or -inf only say what is kept."""
    keeps: list[Expr] = []
    added: list[Expr] = []
    for term in _terms(expr):
        kept = _zero_or_minus_inf(term)
        if kept is not None:
            keeps.append(kept)
        elif term != const(0.0):
            added.append(term)
    bias = None
    for term in added:
        bias = term if bias is None else simplify("add", bias, term)
    return tiles.conjunction(*(k for k in keeps if k != TRUE)), bias


def _terms(expr: Expr) -> list[Expr]:
    if expr[0] in ("float", "double") and expr[1][0] in ("where", "add"):
        return _terms(expr[1])
    if expr[0] != "add":
        return [expr]
    return _terms(expr[1]) + _terms(expr[2])


def _zero_or_minus_inf(term: Expr) -> Expr | None:
    """What is kept by a term that is 0 where kept and -inf elsewhere."""
    if term == const(0.0):
        return TRUE
    if term == const(-math.inf):
        return FALSE
    if term[0] != "where":
        return None
    _, condition, yes, no = term
    left, right = _zero_or_minus_inf(yes), _zero_or_minus_inf(no)
    if left is None or right is None:
        return None
    inside = simplify("and", condition, left)
    outside = simplify("and", simplify("not", condition), right)
    return simplify("or", inside, outside)


def _replace(
    graph: torch.fx.Graph, candidate: Candidate, captured: list[Node], spec: AttentionSpec
) -> Node:
    old = candidate.node
    flat = len(candidate.q.meta["val"].shape) == 3

    def insert(target: object, *args: object, **kwargs: object) -> Node:
        new = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        new.meta = {k: v for k, v in old.meta.items() if k != "val"}
        return new

    with graph.inserting_before(old):
        q, k, v = candidate.q, candidate.k, candidate.v
        if flat:
            q, k, v = (_viewed(insert(aten.unsqueeze.default, x, 1), x) for x in (q, k, v))
        q, k, v = _broadcast_batch(insert, q, k, v)
        new = insert(
            attention, q, k, v, list(captured), spec=spec.to_json(), strategy="production",
            layout="contiguous", group="", name=old.meta.get("ringfx_path", ""),
        )  # fmt: skip
        shape = (*q.meta["val"].shape[:-1], v.meta["val"].shape[-1])
        new.meta["val"] = old.meta["val"].new_empty(shape)
        result = new
        if flat:
            result = insert(aten.squeeze.dim, new, 1)
            result.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(result)
    graph.erase_node(old)
    return new


def _viewed(view: Node, of: Node) -> Node:
    view.meta["val"] = of.meta["val"].unsqueeze(1)
    view.meta["ringfx_needs_grad"] = needs_grad(of)
    return view


def _broadcast_batch(insert: object, q: Node, k: Node, v: Node) -> tuple[Node, Node, Node]:
    """SDPA broadcasts batch and single heads; the canonical operator does not."""
    shapes = [n.meta["val"].shape for n in (q, k, v)]
    batch = max(s[0] for s in shapes)
    result = []
    for node, shape in zip((q, k, v), shapes, strict=True):
        if shape[0] != batch:
            sizes = [batch, *shape[1:]]
            wide: Node = insert(aten.expand.default, node, sizes)  # type: ignore[operator]
            wide.meta["val"] = node.meta["val"].expand(sizes)
            wide.meta["ringfx_needs_grad"] = needs_grad(node)
            result.append(wide)
        else:
            result.append(node)
    return result[0], result[1], result[2]


def _site(candidate: Candidate, node: Node, spec: AttentionSpec) -> AttentionSite:
    q, k, v = (a.meta["val"] for a in node.args[:3])  # type: ignore[union-attr]
    return AttentionSite(
        node=node.name,
        name=node.meta.get("ringfx_path", ""),
        source=node.meta.get("ringfx_source", ""),
        found_by=candidate.found_by,
        spec=spec,
        mask_words=tiles.describe(spec.keep, spec.bias),
        density=tiles.density(spec.keep, spec.q_len, spec.kv_len),
        balanced=tiles.is_balanced(spec.keep, spec.q_len, spec.kv_len),
        batch=int(q.shape[0]),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        head_dim=int(q.shape[-1]),
        v_head_dim=int(v.shape[-1]),
        dtype=str(q.dtype).removeprefix("torch."),
        device=q.device.type,
        trains=needs_grad(node),
    )


def _drop_dead_masks(gm: torch.fx.GraphModule) -> None:
    eliminate_dead(gm.graph)
    gm.recompile()
