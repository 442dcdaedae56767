"""The local program: one text for all ranks, local shapes, and no message that is not needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringfx.comm import conjugate
from ringfx.compile.pipeline import Lowered
from ringfx.ops import attention
from tests.models import shapes
from tests.support.programs import lowered, program_text

MOVES = frozenset(
    {
        conjugate.all_gather_grad_slice, conjugate.all_gather_grad_reduce_scatter,
        conjugate.slice_tokens,
        conjugate.identity_grad_all_reduce, conjugate.grad_bucket_start, conjugate.sum_partials,
    }
)  # fmt: skip


def ids(seq_len: int = 11) -> torch.Tensor:
    return torch.zeros(2, seq_len, dtype=torch.int64)


def moves(program: Lowered) -> Counter[str]:
    graph = program.local.graph_module.graph
    return Counter(getattr(n.target, "__name__", "") for n in graph.nodes if n.target in MOVES)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("model", [shapes.Causal, shapes.Structured, shapes.Neighbours])
def test_every_rank_has_the_same_program(model: Callable[[], Any], ranks: int) -> None:
    programs = [
        lowered(model(), ids(), ranks=ranks, rank=r, on_unsupported="gather") for r in range(ranks)
    ]
    assert len({program_text(p) for p in programs}) == 1
    assert len({p.digest for p in programs}) == 1


def test_the_length_changes_the_digest_and_the_program() -> None:
    one, other = lowered(shapes.Causal(), ids(11)), lowered(shapes.Causal(), ids(12))
    assert one.digest != other.digest


def test_one_rank_runs_the_captured_program() -> None:
    program = lowered(shapes.Causal(), ids(), ranks=1)
    before, after = (
        [n.target for n in g.graph.nodes if n.op == "call_function"]
        for g in (program.captured.graph_module, program.local.graph_module)
    )
    assert before == after
    assert moves(program) == {}


def test_a_split_model_sends_parameters_gradients_and_nothing_else() -> None:
    program = lowered(shapes.Causal(), ids())
    assert set(moves(program)) == {"grad_bucket_start", "slice_tokens"}
    (sliced,) = (
        n for n in program.local.graph_module.graph.nodes if n.target is conjugate.slice_tokens
    )
    assert sliced.args[0].op == "placeholder", "only the token ids are cut"


def test_a_program_without_gradients_shares_nothing() -> None:
    with torch.no_grad():
        program = lowered(shapes.Causal(), ids())
    assert set(moves(program)) == {"slice_tokens"}


def test_one_gather_serves_all_users() -> None:
    class Twice(shapes.Base):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            x = self.first(self.embed(given))
            drawn = x.sigmoid().bernoulli() + torch.dist(x, x.new_ones(()))
            result: torch.Tensor = self.head(drawn + x.roll(1, 1))
            return result

    program = lowered(Twice(), ids())
    assert (
        sum(
            moves(program)[name]
            for name in ("all_gather_grad_slice", "all_gather_grad_reduce_scatter")
        )
        == 1
    )


def test_attention_is_told_its_group_its_layout_and_its_strategy() -> None:
    program = lowered(shapes.Causal(), ids(), strategy="collective")
    nodes = [n for n in program.local.graph_module.graph.nodes if n.target is attention]
    assert len(nodes) == 2
    for node in nodes:
        assert node.kwargs["group"] == "ringfx"
        assert node.kwargs["layout"] == "zigzag"
        assert node.kwargs["strategy"] == "collective"


def test_no_value_of_the_local_program_holds_all_tokens() -> None:
    """A length that nothing else has: 37 tokens are 2 times 2 chunks of 10."""
    program = lowered(shapes.Causal(), ids(37))
    for node in program.local.graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            assert 37 not in value.shape or node.meta.get("ringfx_prologue"), node.format_node()


def test_what_is_moved_is_reported() -> None:
    program = lowered(shapes.Neighbours(), ids())
    reported = Counter(move.kind for move in program.plan.collectives)
    made = moves(program)
    assert (
        reported["all_gather"]
        == made["all_gather_grad_slice"] + made["all_gather_grad_reduce_scatter"]
    )
    assert reported["reduce_scatter"] == made["all_gather_grad_reduce_scatter"]
    assert all(move.reason for move in program.plan.collectives)
    assert all(move.source for move in program.plan.collectives if move.kind == "all_gather")


def test_outputs_stay_split() -> None:
    program = lowered(shapes.Structured(), ids())
    kinds = [output is not None for output in program.local.outputs]
    assert kinds == [True, True, True, True, False, False, False, False]
    logits = program.local.outputs[0]
    assert logits is not None
    assert logits.shape == (2, 11, shapes.VOCAB)
