"""Put each attention into canonical form, its mask as a tile function."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from ringfx import tiles
from ringfx.ops import attention
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.simplify import eliminate_dead
from ringfx.passes.detect import Candidate, Detected
from ringfx.passes.detect.find import decline
from ringfx.passes.masks.additive import Mask, split_additive
from ringfx.passes.masks.documents import in_positions
from ringfx.passes.masks.lift import Index, Lifter, Lifters, renumbered
from ringfx.passes.masks.simplify import TRUE
from ringfx.passes.masks.structure import first_of_equals
from ringfx.passes.values import AttentionSite, Captured, Declined, Sites
from ringfx.spec import AttentionSpec
from ringfx.tiles import Box

__all__ = ["recover"]

aten = torch.ops.aten


def recover(captured: Captured, detected: Detected) -> Sites:
    """Replace every detected attention by the canonical operator.

    Guarantee: the program still computes the same; no S x S mask is left that only attention read.
    A candidate whose mask cannot be carried is declined with its reason and left as it stands.
    """
    found: list[AttentionSite] = []
    declined = list(detected.declined)
    graph = captured.graph_module.graph
    lifters = Lifters(first_of_equals(graph))
    for candidate in detected.candidates:
        answer = _canonicalize(graph, candidate, lifters.of(_box(candidate)))
        if isinstance(answer, Declined):
            declined.append(answer)
        else:
            found.append(answer)
    _drop_dead_masks(captured.graph_module)
    return Sites(found=tuple(found), declined=tuple(declined))


def _canonicalize(
    graph: torch.fx.Graph, candidate: Candidate, lifter: Lifter
) -> AttentionSite | Declined:
    mask = _mask(candidate, lifter)
    (keep, bias), captured = renumbered((mask.keep, mask.bias), lifter.captured)
    learned = [n.name for n in captured if needs_grad(n)]
    if learned:
        return decline(
            candidate.node, f"its bias {learned[0]} is learned; no ring carries that yet"
        )
    q_len, kv_len = _lengths(candidate)
    spec = AttentionSpec(
        scale=candidate.scale,
        q_len=q_len,
        kv_len=kv_len,
        keep=keep,
        bias=bias,
        dropout=candidate.dropout,
        fully_masked=mask.fully_masked,
    )
    node = _replace(graph, candidate, captured, spec)
    return _site(candidate, node, spec)


def _lengths(candidate: Candidate) -> tuple[int, int]:
    return int(candidate.q.meta["val"].shape[-2]), int(candidate.k.meta["val"].shape[-2])


def _box(candidate: Candidate) -> Box:
    """The ranges of the score tensor's indices."""
    shape = candidate.q.meta["val"].shape
    q_len, kv_len = _lengths(candidate)
    batch = max(int(x.meta["val"].shape[0]) for x in (candidate.q, candidate.k, candidate.v))
    heads = int(shape[1]) if len(shape) == 4 else 1
    return Box(b=(0, max(batch, 1)), h=(0, heads), q=(0, q_len), k=(0, kv_len))


def _mask(candidate: Candidate, lifter: Lifter) -> Mask:
    mask = Mask()
    if candidate.mask is not None:
        lifted = lifter.aligned(candidate.mask, _index_of(candidate))
        if candidate.mask.meta["val"].dtype == torch.bool:
            mask = Mask(keep=lifted)
        else:
            mask = split_additive(lifted, lifter.make, *_lengths(candidate))
    keep = in_positions(mask.keep, lifter.captured, lifter.same)
    if candidate.is_causal:
        keep = tiles.conjunction(keep, tiles.CAUSAL)
    return replace(mask, keep=None if keep == TRUE else keep)


def _index_of(candidate: Candidate) -> Index:
    """Index variables of the score tensor, outermost first."""
    rank = len(candidate.q.meta["val"].shape)
    if rank == 3:
        return (("b",), ("q",), ("k",))
    return (("b",), ("h",), ("q",), ("k",))


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
