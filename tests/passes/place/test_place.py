"""Which calls run split, which run whole and why, on small programs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ringfx.compile.pipeline import Lowered
from tests.models import shapes, token_axes
from tests.models.token_axes import Around
from tests.support.programs import lowered

aten = torch.ops.aten


def ids(seq_len: int = 11, batch: int = 2) -> torch.Tensor:
    return torch.zeros(batch, seq_len, dtype=torch.int64)


def split_calls(program: Lowered) -> list[str]:
    return [str(node.target) for node in program.local.placement.modes]


def gathers(program: Lowered) -> list[str]:
    return [move.reason for move in program.plan.collectives if move.kind == "all_gather"]


def calls(program: Lowered) -> list[str]:
    graph = program.captured.graph_module.graph
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_a_causal_model_runs_split_from_end_to_end() -> None:
    program = lowered(shapes.Causal(), ids())
    assert gathers(program) == []
    assert split_calls(program) == calls(program)
    (line,) = program.local.placement.lines.lines
    assert (line.layout.kind, line.length) == ("zigzag", 11)
    assert program.local.placement.reasons == {}


@pytest.mark.parametrize("seq_len", [shapes.HIDDEN, shapes.VOCAB, 40, 8, shapes.HEADS, 2])
def test_sizes_that_coincide_change_nothing(seq_len: int) -> None:
    usual, equal = (lowered(shapes.Causal(), ids(n, 2)) for n in (11, seq_len))
    assert split_calls(equal) == split_calls(usual)
    assert gathers(equal) == []
    assert len(equal.local.placement.lines.lines) == 1


def test_one_rank_splits_nothing() -> None:
    program = lowered(shapes.Causal(), ids(), ranks=1)
    assert split_calls(program) == []
    assert program.plan.collectives == ()


def test_what_needs_all_tokens_says_why() -> None:
    class Distance(shapes.Base):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            x = self.first(self.embed(given))
            result: torch.Tensor = self.second(x / torch.dist(x, x.new_ones(())))
            return result

    program = lowered(Distance(), ids())
    assert "it is one norm of all differences" in program.local.placement.reasons.values()
    assert gathers(program)
    assert any("attention" in name for name in split_calls(program))


def test_what_reduces_the_tokens_is_summed() -> None:
    program = lowered(shapes.Gated(), ids())
    assert program.local.placement.reasons == {}
    assert gathers(program) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_tokens_that_are_merged_in_pairs_stay_split(ranks: int) -> None:
    program = lowered(shapes.Shortened(), ids(12), ranks=ranks)
    assert gathers(program) == []


def test_a_line_is_one_of_blocks_where_tokens_are_cut_into_blocks() -> None:
    program = lowered(Around("windows"), *token_axes.inputs(12), ranks=3)
    assert [line.length for line in program.local.placement.lines.lines] == [12]
    assert gathers(program) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_of_an_image_are_exchanged_with_its_tokens_and_not_gathered(ranks: int) -> None:
    """Each rank is sent 1/p of the tokens, forwards and backwards."""
    program = lowered(Around("rows of an image"), *token_axes.inputs(12), ranks=ranks)
    sent = [m for m in program.plan.collectives if m.kind == "all_to_all"]
    values = 2 * 12 * 8 * token_axes.HIDDEN * 4
    assert sent
    assert {m.in_backward for m in sent} == {False, True}
    assert max(m.bytes_moved for m in sent) == values // ranks


def test_a_table_of_positions_is_no_line_of_tokens() -> None:
    """Its first rows are taken for the tokens; the rest of it is nobody's."""

    class Positions(shapes.Base):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, shapes.HIDDEN))

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            x = self.embed(given) + self.table[: given.shape[1]]
            result: torch.Tensor = self.head(self.first(x))
            return result

    program = lowered(Positions(), ids(11))
    assert [line.length for line in program.local.placement.lines.lines] == [11]
    assert not any(m.kind == "all_to_all" for m in program.plan.collectives)


def test_of_two_token_axes_in_one_tensor_the_one_is_split_that_saves_most() -> None:
    """Five rows leave one of three ranks half idle; attention along columns is then local."""
    program = lowered(shapes.Axial(), torch.zeros(2, 5, 6, shapes.HIDDEN), ranks=3)
    assert [line.length for line in program.local.placement.lines.lines] == [6]
    assert [x.is_local for x in program.plan.layers] == [False, True]
    assert gathers(program) == []


def test_queries_and_keys_of_one_attention_share_a_layout() -> None:
    program = lowered(shapes.EncoderDecoder(), ids(13), ids(8))
    kinds = {line.layout.kind for line in program.local.placement.lines.lines}
    assert len(program.local.placement.lines.lines) == 2
    assert kinds == {"zigzag"}
    assert gathers(program) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_over_a_window_of_other_tokens_runs_along_their_line(ranks: int) -> None:
    program = lowered(shapes.Cropped(1, None), ids(), ranks=ranks)
    assert gathers(program) == []
    (line,) = program.local.placement.lines.lines
    assert line.length == 11


def test_a_mean_over_tokens_is_a_partial_sum_and_no_gather() -> None:
    class Mean(shapes.Base):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.first(self.embed(given)).mean((0, 1))
            return result

    program = lowered(Mean(), ids())
    assert gathers(program) == []
    partial = [n for n, mode in program.local.placement.modes.items() if mode.is_partial_sum]
    assert [str(n.target) for n in partial] == ["aten.mean.dim"]
