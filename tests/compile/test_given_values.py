"""Planning goes on where the model reads values that the call gives, or says what it assumed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ringfx
from ringfx.errors import CaptureRefused, InvalidArgument
from ringfx.ir.note import NoteKind, texts_of


class Reads(nn.Module):
    """Attention after a branch on values, and twice as much if some are hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shown = mask.clone()
        shown[:, 0] = 1
        hidden = shown.numel() - int(shown.sum().item())
        x = self.attend(x)
        return self.attend(x) if hidden > 2 else x


def layers(mask: Tensor, x: Tensor | None = None) -> tuple[int, tuple[str, ...]]:
    x = torch.randn(1, 12, 16) if x is None else x
    plan = ringfx.plan(Reads(), (x, mask), world_size=2)
    return len(plan.layers), tuple(n for n in texts_of(plan.notes) if "assumed" in n)


def test_values_that_the_call_gives_decide() -> None:
    ones = torch.ones(1, 12, dtype=torch.long)
    few = ones.clone()
    few[:, 4:] = 0
    assert layers(ones) == (1, ())
    assert layers(few) == (2, ())


def test_without_values_a_mask_is_assumed_to_hide_nothing_and_the_plan_says_where() -> None:
    found, notes = layers(torch.ones(1, 12, dtype=torch.long, device="meta"))
    assert found == 1
    (note,) = notes
    assert "ones" in note
    assert "test_given_values.py:" in note


class Picks(nn.Module):
    """Attention of the tokens that a comparison or a mask picks."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.inner = by, Reads()

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        match self.by:
            case "hidden":
                x = x[~given]
            case "ids":
                x = x[given > 3]
            case _:
                x = x.masked_select((given > 3)[..., None]).view(-1, 16)
        return self.inner.attend(x[None])


@pytest.mark.parametrize("by", ["hidden", "ids", "selected"])
def test_tokens_that_values_pick_are_all_planned_where_values_are_not_known(by: str) -> None:
    """Zeros, or a mask that is true where something is hidden, would leave none."""
    with torch.device("meta"):
        model, x = Picks(by), torch.randn(1, 12, 16)
        given = torch.ones(1, 12, dtype=torch.bool if by == "hidden" else torch.long)
    plan = ringfx.plan(model, (x, given), world_size=2)
    assert [layer.site.q_len for layer in plan.layers] == [12]
    assert sum("planning assumed every element of" in n for n in texts_of(plan.notes)) == 1


class Shortened(nn.Module):
    """Attention of as many tokens as the longest sequence has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.inner.attend(x[:, : int(lengths.max().item())])


def test_an_error_that_follows_from_an_assumption_says_so() -> None:
    x, lengths = torch.randn(1, 12, 16), torch.tensor([10])
    assert ringfx.plan(Shortened(), (x, lengths), world_size=2).layers[0].site.q_len == 10
    with pytest.raises(InvalidArgument, match="attention of 0 queries") as caught:
        ringfx.plan(Shortened(), (x, lengths.to("meta")), world_size=2)
    (note,) = caught.value.__notes__
    assert note.startswith("planning assumed lengths to hold zeros: ")
    assert "Do: give inputs with their values" in note


def test_a_plan_is_made_in_the_autocast_around_it() -> None:
    with torch.device("meta"):
        model, x, mask = Reads(), torch.randn(1, 12, 16), torch.ones(1, 12, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        plan = ringfx.plan(model, (x, mask), world_size=2)
    assert [layer.site.dtype for layer in plan.layers] == ["bfloat16"]


class Weighed(nn.Module):
    """A branch on what attention gives: nobody knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner.attend(x)
        if torch.isinf(y).any():
            y = y.clamp(-1, 1)
        return self.inner.attend(y)


def test_a_branch_on_unknown_values_is_not_taken_and_the_next_layer_stays_split() -> None:
    with torch.device("meta"):
        model, x = Weighed(), torch.randn(1, 12, 16)
    plan = ringfx.plan(model, (x,), world_size=2)
    assert [x.axis for x in plan.layers] == ["tokens", "tokens"]
    assert sum("to be False" in n for n in texts_of(plan.notes)) == 1
    assert not [m for m in plan.collectives if m.kind == "all_gather"]
    assert plan.memory.peak_bytes > 0


class Kept(nn.Module):
    keep: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("keep", torch.tril(torch.ones(20, 20)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        b = self.keep[: x.shape[1], : x.shape[1]]
        mixed: Tensor = ((q @ k.mT) * b - 1e4 * (1 - b)).softmax(-1) @ v
        return mixed


def test_values_of_a_buffer_tell_the_mask() -> None:
    plan = ringfx.plan(Kept(), (torch.randn(1, 12, 16),), world_size=2)
    assert [x.mask for x in plan.layers] == ["causal"]


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        either: Tensor = torch.cond(x.sum() > 0, lambda x: x[:1], lambda x: x, (x,))
        return either


def test_a_model_that_dynamo_cannot_trace_is_told_so() -> None:
    with pytest.raises(CaptureRefused, match="cannot trace this model, with or without ringfx"):
        ringfx.plan(Untraceable(), (torch.randn(4, 4),), world_size=2)


class Routed(nn.Module):
    """Experts that take the tokens that a router sends them: sizes and indices are read."""

    def __init__(self, by_sizes: bool) -> None:
        super().__init__()
        self.by_sizes, self.inner = by_sizes, Reads()
        self.router, self.experts = nn.Linear(16, 3), nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner.attend(x)
        flat = x.flatten(0, 1)
        chosen = self.router(flat).topk(2, dim=-1).indices
        hit = F.one_hot(chosen, num_classes=4).sum(1)
        if self.by_sizes:
            rows = flat.repeat_interleave(2, 0).split(hit.sum(0)[:3].tolist())
            flat = torch.cat([y @ w for y, w in zip(rows, self.experts, strict=True)])
            return self.inner.attend(flat.view(x.shape[0], -1, 16))
        for expert in (hit.sum(0) > 0).nonzero():
            flat = flat + flat @ self.experts[expert[0]]
        return self.inner.attend(flat.view_as(x))


@pytest.mark.parametrize("by_sizes", [False, True])
def test_a_router_is_assumed_to_choose_each_expert_as_often(by_sizes: bool) -> None:
    plan = ringfx.plan(Routed(by_sizes), (torch.randn(1, 12, 16),), world_size=2)
    assert len(plan.layers) == 2
    (note,) = (n for n in texts_of(plan.notes) if "assumed" in n)
    assert "topk to choose each of 3 as often" in note


class Masked(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        hidden = self.keep[: x.shape[1], : x.shape[1]] == 0
        mixed: Tensor = (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return mixed


def test_a_mask_in_a_buffer_without_values_counts_as_given_and_the_plan_says_so() -> None:
    with torch.device("meta"):
        model, x = Masked(), torch.randn(1, 12, 16)
    plan = ringfx.plan(model, (x,), world_size=2)
    assert [x.mask for x in plan.layers] == ["a mask given as input"]
    (note,) = texts_of(plan.notes, NoteKind.NO_VALUES)
    assert "keep" in note
    assert "Do: build the model on cpu" in note
    plan = ringfx.plan(Masked(), (torch.randn(1, 12, 16),), world_size=2)
    assert not texts_of(plan.notes, NoteKind.NO_VALUES)


def test_scores_times_a_buffer_without_values_are_split_and_the_plan_says_so() -> None:
    with torch.device("meta"):
        model, x = Kept(), torch.randn(1, 12, 16)
    plan = ringfx.plan(model, (x,), world_size=2)
    assert [x.mask for x in plan.layers] == ["full, bias given as input, score map"]
    (note,) = texts_of(plan.notes, NoteKind.NO_VALUES)
    assert "masks read buffers that have no values here: keep" in note


class Between(nn.Module):
    """Between two programs: tokens by a mask, or channels, which each rank picks of its own."""

    def __init__(self, pick: str) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.pick = pick

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        if self.pick == "selected":
            x = x.masked_select(mask[..., None]).view(1, -1, 16)
        else:
            x = x[mask][None] if self.pick == "tokens" else x[:, :, mask]
        made: Tensor = self.second(x)
        return made


@pytest.mark.parametrize(
    ("pick", "shape", "gathers"),
    [("tokens", (1, 64), True), ("selected", (1, 64), True), ("channels", (16,), False)],
)
def test_a_plan_says_what_picking_tokens_gathers(
    pick: str, shape: tuple[int, ...], gathers: bool
) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    plan = ringfx.plan(Between(pick), (torch.randn(1, 64, 16), mask), world_size=2)
    said = [note for note in texts_of(plan.notes) if "gathers 4.00 KiB on every rank" in note]
    assert len(said) == int(gathers), plan.notes
    assert all("it picks tokens by a mask" in note for note in said)
