"""The axes of attention itself: b h s d, b g t d, b g t e -> b h s e."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ops import attention
from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisRule, Call, Labels, OpAxes, given_input
from ringfx.passes.axes.rules.pattern import labels_like, leading, shares

__all__ = ["RULES"]


def canonical(call: Call) -> OpAxes:
    """Query and key tokens are independent: the strategy moves what crosses; others are not.

    Batch and heads are independent too where no captured tensor is read by their index. A captured
    tensor that is read at the query's own row has query tokens as well.
    """
    q, k, v = (a.meta["val"].shape for a in call.node.args[:3])  # type: ignore[union-attr]
    operands = _qkv(q, k, v)
    rest = tuple(_captured(call))
    others = {x for labels in rest for dim in labels or () for x in dim} - {"s"}
    return OpAxes(
        operands=(*operands, *rest),
        results=(_result(q, v),),
        share=shares(needs_all=["d", "e", *others, *_indexed(operands, rest)]),
        how=how.Attend(
            tokens=frozenset({"s", "t"}), captured=frozenset(range(3, len(call.operands)))
        ),
    )


def _captured(call: Call) -> Iterator[Labels | None]:
    """Labels of what the tile functions read; None for what is read at other than its own rows.

    An input of the program is replicated as it is.
    """
    spec = AttentionSpec.from_json(call["spec"])
    rows = tiles.rows_read(*spec.functions)
    for i, value in enumerate(call.operands[3:]):
        shape = value.meta["val"].shape
        if i not in rows or given_input(value) or shape[rows[i]] != spec.q_len:
            yield None
            continue
        names = ["s" if d == rows[i] else f"read{i}.{d}" for d in range(len(shape))]
        yield tuple((name,) if size != 1 else () for name, size in zip(names, shape, strict=True))


def sdpa(call: Call) -> OpAxes:
    q, k, v = call.shape("query"), call.shape("key"), call.shape("value")
    operands = _qkv(q, k, v)
    rest = (None,) * (len(call.operands) - 3)
    return OpAxes(
        operands=(*operands, *rest),
        results=(_result(q, v),),
        share=shares(needs_all=["s", "t", "d", "e", *_indexed(operands, rest)]),
        reason="this attention is not in canonical form",
    )


def _indexed(operands: Sequence[Labels], rest: Sequence[Labels | None]) -> set[str]:
    """Batch and heads, if a mask or a captured tensor may be read by their index."""
    if not rest:
        return set()
    return {name for labels in operands for dim in labels[:-2] for name in dim}


def _qkv(q: torch.Size, k: torch.Size, v: torch.Size) -> tuple[Labels, Labels, Labels]:
    batch = leading(max(len(q) - 2, 0))
    sizes = {name: max(q[i], k[i]) for i, name in enumerate(batch)}
    named = list(batch)
    if len(q) >= 3 and q[-3] != k[-3] and k[-3] != 1:  # grouped heads: unequal, not broadcast
        named[-1] = "g"
    prefix = " ".join(named)
    return (
        labels_like(q, " ".join([*batch, "s", "d"]), sizes),
        labels_like(k, f"{prefix} t d", sizes),
        labels_like(v, f"{prefix} t e", sizes),
    )


def _result(q: torch.Size, v: torch.Size) -> Labels:
    shape = (*q[:-1], v[-1])
    return labels_like(shape, " ".join([*leading(max(len(q) - 2, 0)), "s", "e"]), {})


def kernel(call: Call) -> OpAxes:
    """A kernel that detection declined: all of it is replicated."""
    named = [
        tuple((f"r{n}.{d}",) if size != 1 else () for d, size in enumerate(shape))
        for n, shape in enumerate(call.result_shapes)
    ]
    return OpAxes(
        operands=(None,) * len(call.operands),
        results=tuple(named),
        share=shares(needs_all=[x for labels in named for dim in labels for x in dim]),
        reason="this attention is not in canonical form",
    )


aten = torch.ops.aten
KERNELS = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_attention_math.default,
    aten._flash_attention_forward.default,
    aten._efficient_attention_forward.default,
)

RULES: Mapping[object, AxisRule] = {
    attention: canonical,
    aten.scaled_dot_product_attention.default: sdpa,
    **dict.fromkeys(KERNELS, kernel),
}
