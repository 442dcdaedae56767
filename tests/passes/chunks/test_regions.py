"""Which parts of a program run in chunks, and what the program and its plan are then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ringfx.compile.compilers import compile_bodies
from ringfx.compile.pipeline import Lowered
from ringfx.compile.settings import Settings
from ringfx.errors import InvalidArgument
from ringfx.ops.chunked import body_of
from ringfx.passes.chunks.region import TokenLocal
from ringfx.passes.rewrite import DeferredOutput
from ringfx.torch_compat.fake_tensors import FakeTensorMode
from tests.end_to_end.models import llama, tokens
from tests.models.wide import LOSSES, SEVERAL_NUMBERS, WideModel
from tests.support.programs import lowered

CHUNK = 3


def program(model: nn.Module, *, ranks: int = 2, chunks: Any = CHUNK, tokens: int = 22) -> Lowered:
    given = torch.zeros(2, tokens, dtype=torch.int64)
    return lowered(model, given, given, ranks=ranks, chunks=chunks)


def names(made: Lowered) -> list[str]:
    return [x.name for x in made.plan.chunks]


def calls(made: Lowered) -> list[str]:
    graph = made.local.graph_module.graph
    return [str(n.target) for n in graph.nodes if "ringfx.chunked" in str(n.target)]


def has_wide_values(made: Lowered) -> bool:
    """Whether the rank's program still makes logits."""
    values = [n.meta.get("val") for n in made.local.graph_module.graph.nodes]
    return any(isinstance(v, Tensor) and v.dim() > 1 and v.shape[-1] == 257 for v in values[40:])


@pytest.mark.parametrize("loss", LOSSES)
def test_mlps_and_losses_are_found_however_the_loss_is_spelled(loss: str) -> None:
    made = program(WideModel(loss))
    assert names(made) == ["blocks.0", "blocks.1", "head"]
    one_sum = loss not in SEVERAL_NUMBERS
    found = ["again", "again", "with it" if one_sum else "again"]
    assert [x.gradients for x in made.plan.chunks] == found
    assert calls(made)[2] == f"ringfx.chunked{'_loss' if one_sum else ''}.default"
    assert {x.tokens for x in made.plan.chunks} == {CHUNK}
    assert {x.count for x in made.plan.chunks} == {4}  # 11 tokens a rank


def test_equal_layers_share_one_body() -> None:
    assert len(program(WideModel()).local.bodies) == 2


def test_a_body_is_compiled_within_whichever_program_asks_for_it_first() -> None:
    """Equal programs share it: its own tensors without values may be those of another one."""
    bodies = program(WideModel()).local.bodies
    with FakeTensorMode():
        compile_bodies(bodies, "aot_eager")
    assert all((what, CHUNK) in body_of(key).compiled for key in bodies for what in bodies[key])


def test_logits_that_are_returned_are_deferred() -> None:
    made = program(WideModel(returns_logits=True))
    _, logits = made.local.outputs
    assert isinstance(logits, DeferredOutput)
    assert logits.shape == (2, 22, 257)
    assert made.plan.chunks[2].deferred == 1
    assert "computed when it is touched" in " ".join(str(made.plan).split())


def test_logits_of_one_rank_are_returned_as_they_are() -> None:
    assert names(program(WideModel(returns_logits=True), ranks=1)) == ["blocks.0", "blocks.1"]


def test_a_loss_of_one_rank_runs_in_chunks_as_well() -> None:
    assert names(program(WideModel("smoothed"), ranks=1)) == ["blocks.0", "blocks.1", "head"]


def test_none_leaves_the_program_as_it_is() -> None:
    made = program(WideModel(), chunks="none")
    assert not made.plan.chunks
    assert not calls(made)


def test_small_parts_run_at_once() -> None:
    assert not program(WideModel(), chunks="all").plan.chunks


def test_the_predicted_peak_falls() -> None:
    peaks = [
        program(WideModel(returns_logits=True), chunks=c, tokens=512).plan.memory.peak_bytes
        for c in ("none", 16)
    ]
    assert peaks[1] < 0.7 * peaks[0]


class Projected(nn.Module):
    """Wide, and read by attention: no region, as all that is wide would leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, 16)
        self.qkv = nn.Linear(16, 192)

    def forward(self, tokens: Tensor, _: Tensor) -> Tensor:
        B, S = tokens.shape
        q, k, v = self.qkv(self.embed(tokens)).view(B, S, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).square().sum()


def test_a_fused_projection_to_attention_is_no_region() -> None:
    assert not program(Projected()).plan.chunks


def looked_at(monkeypatch: pytest.MonkeyPatch, layers: int) -> int:
    """How often it is asked whether a call may stand in a region."""
    asked = []
    usual = TokenLocal.joins
    with monkeypatch.context() as patch:
        patch.setattr(TokenLocal, "joins", lambda self, n: asked.append(n) or usual(self, n))
        lowered(llama(num_hidden_layers=layers)(), tokens(64), ranks=2, chunks="auto")
    return len(asked)


def test_regions_are_looked_for_in_time_linear_in_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From wide queries and keys a region would go on through all layers behind."""
    few, many = (looked_at(monkeypatch, layers) for layers in (2, 8))
    assert 0 < many <= 4.5 * few


@pytest.mark.parametrize("value", ["some", 0, -3, True, 1.5, None])
def test_unknown_chunks_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="use auto, all or none"):
        Settings.of({"chunks": value})
