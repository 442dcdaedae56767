"""Few queries, of which every rank has all: each attends to its own keys, and the ranks merge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ringfx.ir.layout import Layout
from ringfx.ops import attention
from ringfx.strategies import SPLIT_KV
from tests.ops.cases import KINDS, spec
from tests.ops.oracle import Example, Result, data, difference, join, reference, split
from tests.passes.rewrite.virtual_ranks import run_on_ranks
from tests.support.ranks import RankPool
from tests.support.recorded import recorded

Tensor = torch.Tensor


def on_rank(example: Example, rank: int, ranks: int, group: str) -> dict[str, Tensor]:
    """The output, the gradient of all queries and inputs, those of this rank's keys and values."""
    found, layout = data(example), Layout(example.layout, example.spec.kv_len, ranks)
    q = found.q.clone().requires_grad_()
    k, v = (split(x, layout, rank).requires_grad_() for x in (found.k, found.v))
    inputs = [
        x.clone().requires_grad_() if example.trains_inputs and x.is_floating_point() else x
        for x in found.inputs
    ]
    out = attention(
        q, k, v, inputs, spec=example.spec.to_json(), strategy=SPLIT_KV.name,
        layout=example.layout, group=group, name="pool",
    )  # fmt: skip
    out.backward(found.dout)
    leaves = {"q": q, "k": k, "v": v}
    leaves |= {f"inputs[{i}]": x for i, x in enumerate(inputs) if x.requires_grad}
    return {"out": out.detach()} | {
        name: x.grad for name, x in leaves.items() if x.grad is not None
    }


def split_over(example: Example, ranks: int) -> Result:
    """What is whole must be the same on every rank, to the bit."""
    by_rank = run_on_ranks(ranks, lambda rank: on_rank(example, rank, ranks, "threads"))
    layout = Layout(example.layout, example.spec.kv_len, ranks)
    joined = {name: join([part[name] for part in by_rank], layout) for name in "kv"}
    for name in by_rank[0].keys() - joined.keys():
        same = [
            torch.equal(part[name].nan_to_num(7.0), by_rank[0][name].nan_to_num(7.0))
            for part in by_rank
        ]
        assert all(same), name
        joined[name] = by_rank[0][name]
    out = joined.pop("out")
    return Result(out=out.double(), grads={n: x.double() for n, x in joined.items()})


EXAMPLES = {
    **KINDS,
    "one query": Example(spec=spec(1, 30)),
    "one query, fewer keys than ranks": Example(spec=spec(1, 2)),
    "four queries, grouped heads": Example(spec=spec(4, 30), kv_heads=1, v_head_dim=5),
}


@pytest.mark.parametrize(("ranks", "layout"), [(2, "contiguous"), (3, "zigzag")])
def test_every_kind_of_attention_is_equal(ranks: int, layout: str) -> None:
    for label, example in EXAMPLES.items():
        example = replace(example, layout=layout)
        worst = max(difference(split_over(example, ranks), reference(example)).values())
        assert worst < 1e-9, (label, worst)


def test_half_precision_is_merged_in_float32() -> None:
    example = Example(spec=spec(2, 40), dtype=torch.bfloat16)
    worst = max(difference(split_over(example, 3), reference(example)).values())
    assert worst < 2e-2


def sent(example: Example) -> tuple[int, int]:
    """Numbers that this rank gives into messages, forward and backward."""
    group = dist.group.WORLD
    assert group is not None
    with recorded() as messages:
        on_rank(example, group.rank(), group.size(), group.group_name)
    assert messages == ["all_reduce"] * 3, "no key or value is moved"
    largest, merged, gradient = (m.num_bytes // torch.float32.itemsize for m in messages)
    return largest + merged, gradient


def test_a_message_has_as_many_numbers_as_the_queries(ranks2: RankPool) -> None:
    example = Example(spec=spec(3, 64), dtype=torch.float32, v_head_dim=5)
    rows = example.batch * example.heads * 3
    for forward, backward in ranks2.run(sent, example):
        assert forward == rows * (5 + 2)
        assert backward == rows * example.head_dim
