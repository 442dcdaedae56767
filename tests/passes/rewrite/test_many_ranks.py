"""One program for any number of ranks: the same calls in the same order, only sizes differ.

The programs are made for ranks that do not exist, as ``ringfx.plan`` makes them: nothing in them is
computed or sent, and only the number of ranks is told to the passes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

from ringfx.compile.pipeline import Lowered
from ringfx.ir.layout import Layout
from ringfx.passes.split_modes import local_shape
from ringfx.passes.token_axes.find_token_lines import TokenDim
from tests.models import hugging_face
from tests.support.programs import lowered
from tests.support.sampling import one_in

RANKS = (8, 64, 1024)
MANY_TOKENS = 1 << 15


def llama(seq_len: int, ranks: int, rank: int = 0) -> Lowered:
    model = hugging_face.llama(max_position_embeddings=2 * MANY_TOKENS, attn_implementation="sdpa")
    tokens = torch.zeros(1, seq_len, dtype=torch.int64)

    def train(ids: torch.Tensor) -> Any:
        return model(input_ids=ids, labels=ids)

    return lowered(train, tokens, ranks=ranks, rank=rank)


def structure(program: Lowered) -> list[tuple[Any, ...]]:
    """Every node's kind, target and what it reads, but no size."""
    graph = program.local.graph_module.graph
    return [(n.op, _name(n), *(i.name for i in n.all_input_nodes)) for n in graph.nodes]


def _name(node: Node) -> str:
    return node.name if node.op == "placeholder" else str(getattr(node.target, "__name__", node))


def strategies(program: Lowered) -> list[str]:
    return [layer.strategy for layer in program.plan.layers]


@pytest.mark.parametrize("seq_len", one_in(2, [MANY_TOKENS + 4099, MANY_TOKENS]))
def test_the_program_is_the_same_for_8_64_and_1024_ranks(seq_len: int) -> None:
    programs = {ranks: llama(seq_len, ranks) for ranks in RANKS}
    expected = structure(programs[RANKS[0]])
    assert len(expected) > 100
    for ranks, program in programs.items():
        assert structure(program) == expected
        assert strategies(program) == ["production", "production"]
        (line,) = program.local.placement.lines.lines
        assert (line.layout.kind, line.length) == ("zigzag", seq_len)
        assert line.layout.world_size == ranks


def test_local_sizes_are_those_of_the_layout() -> None:
    seq_len = MANY_TOKENS + 4099
    for ranks in RANKS:
        program = llama(seq_len, ranks)
        length = Layout("zigzag", seq_len, ranks).local_length
        assert length == -(-seq_len // (2 * ranks)) * 2
        checked = 0
        for value, made in program.local.values.items():
            tokens = program.local.placement.lines.token_dim(value)
            if not program.local.placement.is_sharded(value) or not isinstance(tokens, TokenDim):
                continue
            shape = tuple(made.meta["val"].shape)
            assert shape == local_shape(program.local.placement.lines, value)
            assert shape[tokens.dim] == tokens.outer * length * tokens.inner
            checked += 1
        assert checked > 80


def test_every_rank_is_given_the_same_program() -> None:
    first, last = (llama(MANY_TOKENS + 1, 1024, rank) for rank in (0, 1023))
    assert structure(first) == structure(last)
    assert first.digest == last.digest
