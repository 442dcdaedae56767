"""A model against itself over ranks; faults are planted here, and the ranks inherit them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.fx import Node

import ringfx
from ringfx.comm.local_ranks import can_inherit
from ringfx.comparison import run
from ringfx.comparison.on_ranks import handed
from ringfx.errors import CommunicationError, InvalidArgument, SplitDiffers
from ringfx.ir.layout import Layout
from ringfx.passes.split_modes.labelled import Labelled
from tests.comparison.models import Decoder, ids

aten = torch.ops.aten
inherits = pytest.mark.skipif(not can_inherit(), reason="ranks are not forked beside a device")


@pytest.mark.ranks
def test_a_right_split_agrees_and_bfloat16_is_as_far_as_unsplit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over ranks that get the model in a file, as beside a device."""
    monkeypatch.setattr(run, "can_inherit", lambda: False)
    model = Decoder()
    before = [p.clone() for p in model.parameters()]
    found = ringfx.verify(model, ids(), strategy="simple")
    assert found.ok
    assert found.raise_if_different() is found
    assert found.strategies == ("simple", "simple")
    assert {x.kind: x.count for x in found.worst} == {"loss": 1, "output": 1, "gradient": 23}
    assert all(x.found < 1e-10 for x in found.worst)
    assert found.narrow is not None
    assert all(found.narrow.split[k] < 2 * x + 1e-2 for k, x in found.narrow.unsplit.items())
    assert "agrees with the unsplit model" in str(found)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


class Dropping(nn.Module):
    """One attention that drops weights, and a loss in float32 whatever the model's type is."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.qkv = nn.Embedding(32, 16), nn.Linear(16, 48)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.words(ids)).chunk(3, -1)
        dropout = 0.1 if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        logits = self.head(x)[:, :-1].float().flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


@inherits
@pytest.mark.ranks
def test_a_loss_in_float32_is_no_difference_with_dropout_either() -> None:
    words = torch.randint(32, (2, 193), generator=torch.Generator().manual_seed(0))
    found = ringfx.verify(Dropping(), words, narrow=None)
    assert found.ok, found
    assert any("drops weights" in note for note in found.notes)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] / 2


def halved(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _Halved.apply(x)  # type: ignore[no-untyped-call]
    return result


@inherits
@pytest.mark.ranks
def test_a_gradient_that_one_rule_halves_is_found_in_its_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Labelled.emit

    def emit(self: Any, call: Any) -> Node:
        node = call.named.call.node
        new = right(self, call)
        if node.target is aten.gelu.default and "layers.1" in node.meta["ringfx_path"]:
            new.meta = {k: v for k, v in node.meta.items() if k != "val"}
            with call.local.graph.inserting_after(new):
                new = call.local.graph.call_function(halved, (new,))
        return new

    monkeypatch.setattr(Labelled, "emit", emit)
    found = ringfx.verify(Decoder(), ids(), narrow=None)
    assert found.first is not None
    assert (found.first.layer, found.first.direction) == ("layers.1.mlp.1", "backward")
    assert any(x.name == "gradient of layers.0.qkv.weight" for x in found.different)
    with pytest.raises(SplitDiffers, match=r"first difference, in backward: layers\.1\.mlp\.1"):
        found.raise_if_different()


@inherits
@pytest.mark.ranks
def test_a_shard_shifted_by_a_token_is_found_where_it_is_first_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Layout.positions

    def positions(self: Layout, rank: int, device: Any = None) -> torch.Tensor:
        found = right(self, rank, device)
        return found.roll(1) if rank == 1 and dist.is_initialized() else found

    class Inside(nn.Module):
        """Defined in a function: only ranks that are forked have it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = Decoder(layers=1)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids)
            return logits

    monkeypatch.setattr(Layout, "positions", positions)
    found = ringfx.verify(Inside(), ids(), narrow=None)
    assert found.first is not None
    assert (found.first.layer, found.first.direction) == ("model.embed", "forward")
    assert found.first.what == "its output"


@pytest.mark.ranks
def test_an_error_on_a_rank_comes_back_whole() -> None:
    with pytest.raises(CommunicationError, match=r"rank 0 of 2: Traceback(.|\n)*no attention over"):
        ringfx.verify(nn.Linear(4, 4), torch.randn(8, 4), narrow=None)


def test_what_cannot_be_compared_is_refused_at_once() -> None:
    for options, text in (
        ({"mesh": object()}, "world_size in place of mesh"),
        ({"outputs": "local"}, 'outputs="local"'),
        ({"strategy": "fast"}, "unknown strategy 'fast'"),
        ({"world_size": 0}, "world_size"),
        ({"reduce": "yes"}, "reduce is 'yes'"),
        ({"narrow": "bf16"}, "narrow is 'bf16'"),
        ({"narrow": torch.int8}, r"narrow is torch\.int8"),
        ({"loss": "mse"}, "loss is 'mse'"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            ringfx.verify(Decoder(), ids(), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"unsplit model itself fails(.|\n)*IndexError"):
        ringfx.verify(Decoder(), ids() + 1000)


def test_a_model_that_does_not_fit_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_memory", lambda: 2048)
    with pytest.raises(InvalidArgument, match=r"this machine has 2\.00 KiB\. Do: pass reduce=True"):
        ringfx.verify(Decoder(), ids())


def test_what_cannot_be_pickled_says_so(tmp_path: Any) -> None:
    with (
        pytest.raises(InvalidArgument, match="cannot be sent to the ranks"),
        handed(lambda: 0, tmp_path),
    ):
        pass
