"""Split outputs are gathered when touched, and only then; nothing quadratic exists on the way."""

from __future__ import annotations

import copy
import datetime
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import ringfx
from examples.peak_memory import extra_bytes
from tests.end_to_end.models import llama, plain, shifted_loss, tokens
from tests.support.harness import RankPool, gradient_differences
from tests.support.recorded import recorded

VOCAB = 1009
MIB = 2**20


def optimized_llama(**sizes: Any) -> nn.Module:
    return ringfx.optimize(llama(vocab_size=VOCAB, **sizes)(), compiler="eager")


def communicated_bytes(function: Any) -> int:
    """Bytes of all tensors that this rank gave to collectives or sent."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        function()
    total = 0
    for event in recorded.events():
        if event.name.startswith(("gloo:", "c10d::")) and event.input_shapes:
            sizes = [torch.Size(s).numel() for s in event.input_shapes if s]
            total += 4 * sum(sizes)
    return total


def bytes_untouched_and_touched(seq_len: int) -> tuple[int, int]:
    model = optimized_llama()
    drawn = tokens(seq_len, vocab=VOCAB)

    def call() -> Any:
        with torch.no_grad():
            return model(input_ids=drawn, labels=drawn)

    call()  # compiles, and compares parameters once
    untouched = communicated_bytes(lambda: call().loss.item())
    touched = communicated_bytes(lambda: call().logits.numpy())
    return untouched, touched


@pytest.mark.ranks
def test_logits_that_nobody_reads_are_never_gathered(ranks2: RankPool) -> None:
    seq_len = 128
    shard = seq_len // 2 * VOCAB * 4
    for untouched, touched in ranks2.run(bytes_untouched_and_touched, seq_len):
        assert untouched < shard / 2
        assert touched >= shard


def ways_to_read(seq_len: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a user may do with logits, beside the stock model's."""
    stock = llama()()
    model = ringfx.optimize(llama()(), compiler="eager")
    drawn = tokens(seq_len, 2)
    with torch.no_grad():
        expected = stock(input_ids=drawn).logits
        ways: dict[str, Any] = {
            "indexing": lambda logits: logits[:, -1],
            "argmax": lambda logits: logits.argmax(-1),
            "float": lambda logits: logits.float() * 2,
            "softmax": lambda logits: torch.nn.functional.softmax(logits, -1),
            "numpy": lambda logits: torch.from_numpy(logits.numpy()),
            "shape": lambda logits: torch.tensor(logits.shape),
            "list": lambda logits: torch.tensor(logits[0, :2].tolist()),
            "deep copy": lambda logits: copy.deepcopy(logits.detach()),
        }
        return {
            name: (way(model(input_ids=drawn).logits), way(expected)) for name, way in ways.items()
        }


@pytest.mark.slow
@pytest.mark.ranks
def test_a_gathered_output_is_read_like_any_tensor(ranks3: RankPool) -> None:
    for read in ranks3.run(ways_to_read, 25):
        for name, (ours, expected) in read.items():
            assert type(ours) is torch.Tensor, name
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4, msg=name)


def reads(seq_len: int) -> dict[str, tuple[Any, Any, int]]:
    """Ways to read logits of a plain model, the stock model's, and the bytes that were moved."""
    stock, model = plain()(), ringfx.optimize(plain()(), compiler="eager")
    drawn = tokens(seq_len, 2)
    bias = torch.arange(seq_len, dtype=torch.float32)[:, None]
    found = {}
    with torch.no_grad():
        expected = stock(drawn)
        for name, way in WAYS.items():
            logits = model(drawn)
            with recorded() as sent:
                ours = way(logits, bias)
                moved = sum(m.num_bytes for m in sent)
            found[name] = (ours, way(expected.clone(), bias), moved)
    return found


WAYS: dict[str, Any] = {
    "last": lambda x, b: x[:, -1],
    "one": lambda x, b: x[:, 7],
    "some": lambda x, b: x[:, 3:9:2],
    "of one sample": lambda x, b: x[1, -2],
    "largest of the last": lambda x, b: x[:, -1].argmax(-1),
    "last of the largest": lambda x, b: x.argmax(-1)[:, -1],
    "last of a float copy": lambda x, b: (x.double() * 2)[:, -1:],
    "largest": lambda x, b: x.argmax(-1) + 0,
    "values": lambda x, b: x.max(-1).values,
    "mask": lambda x, b: (x > 0)[:, 2],
    "with positions": lambda x, b: (x + b)[:, -1],
    "softmax": lambda x, b: torch.softmax(x / 0.7, -1)[:, 5:8],
    "top": lambda x, b: x.topk(3, -1).indices[..., 0, :],
    "flat": lambda x, b: x.view(-1, x.shape[-1]).log_softmax(-1),
    "transposed": lambda x, b: x.transpose(1, 2),
    "all but the last": lambda x, b: x[:, :-1],
    "mean": lambda x, b: x.mean(1),
    "in place": lambda x, b: x.mul_(2) + x,
}
FEW = 6 * 96 * 8 * 2
"""Bytes of what the tokens that are asked for may need, a tenth of the logits."""


@pytest.mark.parametrize("ranks", [pytest.param("ranks2", marks=pytest.mark.slow), "ranks3"])
def test_only_the_tokens_that_are_read_are_moved(
    ranks: str, request: pytest.FixtureRequest
) -> None:
    whole = {"largest", "values", "flat", "transposed", "all but the last", "mean", "in place"}
    for read in request.getfixturevalue(ranks).run(reads, 101):
        for name, (ours, expected, moved) in read.items():
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4, msg=name)
            assert name in whole or 0 < moved < FEW, (name, moved)


def gradients_through_reads(seq_len: int) -> float:
    """Losses outside of the model, on logits that stay split as long as they can."""
    drawn = tokens(seq_len, 2)
    worst = 0.0
    for way in (
        lambda x: x[:, -1].square().sum(),
        lambda x: (x.square() * x.exp()).mean(),
        lambda x: shifted_loss(x, drawn),
        lambda x: torch.nn.functional.cross_entropy(x.view(-1, x.shape[-1]), drawn.view(-1)),
        lambda x: (
            torch.log_softmax(x.float(), -1)[:, 2:5] * x.sum(-1, keepdim=True)[:, 1:2]
        ).sum(),
    ):
        stock, source = plain()().double(), plain()().double()
        way(stock(drawn)).backward()
        way(ringfx.optimize(source, compiler="eager")(drawn)).backward()
        found, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (source, stock))
        worst = max(worst, *gradient_differences(found, expected).values())
    return worst


def test_gradients_flow_through_what_is_read(ranks3: RankPool) -> None:
    assert max(ranks3.run(gradients_through_reads, 25)) < 1e-5


def _log_probabilities(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    found = x[:, :-1].log_softmax(-1).gather(-1, y[:, 1:, None]).squeeze(-1)
    return -found.sum(-1).mean()


LOSSES: dict[str, Any] = {
    "shifted": shifted_loss,
    "labels shifted": lambda x, y: F.cross_entropy(
        x.float().view(-1, x.shape[-1]), F.pad(y[:, 1:], (0, 1), value=-100).view(-1)
    ),
    "of each token": lambda x, y: (
        F.cross_entropy(
            x[..., :-1, :].contiguous().view(-1, x.shape[-1]), y[:, 1:].reshape(-1),
            reduction="none", label_smoothing=0.1,
        ).view(2, -1) * torch.arange(1, y.shape[1])
    ).mean(),
    "classes second": lambda x, y: F.cross_entropy(x[:, :-1].transpose(1, 2), y[:, 1:]),
    "log probabilities": _log_probabilities,
    "without a prompt": lambda x, y: F.cross_entropy(
        x[:, 4:-1].flatten(0, 1), y[:, 5:].flatten(), ignore_index=7
    ),
    "gathered": lambda x, y: x.sort(1).values[:, -1].square().mean(),
}  # fmt: skip


def losses_outside(seq_len: int) -> dict[str, tuple[float, float, int, str]]:
    """How far losses and gradients are from the stock model's; what the plan lists as gathered, in
    bytes, and where."""
    drawn = tokens(seq_len, 2)
    stock, source = plain()().double(), plain()().double()
    model: Any = ringfx.optimize(source, compiler="eager")
    found = {}
    for name, loss_of in LOSSES.items():
        stock.zero_grad()
        source.zero_grad()
        expected, loss = loss_of(stock(drawn), drawn), loss_of(model(drawn), drawn)
        expected.backward()
        loss.backward()
        ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (source, stock))
        gathers = [m for m in model.plan.collectives if m.node == "python"]
        worst = max(gradient_differences(ours, theirs).values())
        moved, where = sum(m.bytes_moved for m in gathers), "".join(m.source for m in gathers)
        found[name] = (abs(loss.item() - expected.item()), worst, moved, where)
    return found


def test_a_loss_outside_the_model_stays_split_or_is_listed(
    ranks2: RankPool, ranks3: RankPool
) -> None:
    for ranks, length in ((ranks2, 19), (ranks3, 24)):
        for found in ranks.run(losses_outside, length):
            logits = 2 * length * 96 * 8
            for name, (loss, worst, moved, where) in found.items():
                assert loss < 1e-5, name
                assert worst < 1e-5, name
                assert moved == logits if name == "gathered" else moved < logits / 50, (name, where)
            assert "test_outputs.py" in found["gathered"][3]


def local_output(seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens, and the stock model's whole output."""
    model = ringfx.optimize(plain()(), compiler="eager", outputs="local")
    drawn = tokens(seq_len)
    with torch.no_grad():
        return model(drawn), plain()()(drawn)


@pytest.mark.ranks
def test_local_outputs_are_each_ranks_own_tokens(ranks2: RankPool) -> None:
    """Causal layers run zigzag: rank r holds chunks r and 2p - 1 - r."""
    results = ranks2.run(local_output, 16)
    whole = results[0][1]
    for rank, (mine, _) in enumerate(results):
        first, last = whole.split(4, 1)[rank], whole.split(4, 1)[3 - rank]
        torch.testing.assert_close(torch.as_tensor(mine), torch.cat([first, last], 1))


def quadratic_memory(seq_len: int) -> int | None:
    sizes = {"hidden_size": 16, "head_dim": 8, "intermediate_size": 32, "vocab_size": 32}
    model = ringfx.optimize(llama(num_hidden_layers=1, **sizes)(), compiler="eager")
    drawn = tokens(seq_len, vocab=32)

    def step() -> None:
        model(input_ids=drawn, labels=drawn).loss.backward()

    step()
    return extra_bytes(step)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.ranks
def test_no_matrix_of_all_queries_and_keys_exists(ranks2: RankPool) -> None:
    """A whole step needs less than that matrix alone would, were it only bool."""
    seq_len = 8192
    matrix = seq_len**2
    whole = quadratic_memory(seq_len)
    assert whole is not None
    assert whole < 0.8 * matrix
    for split in ranks2.run(quadratic_memory, seq_len):
        assert split < 0.8 * matrix / 2


def rank_touches_alone(rank: int) -> str | None:
    """What the rank that touches hears; the others wait for it at the end."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=4))
    model = ringfx.optimize(llama(vocab_size=VOCAB)(), compiler="eager", mesh=group)
    drawn = tokens(16, vocab=VOCAB)
    with torch.no_grad():
        logits = model(input_ids=drawn).logits
    heard = None
    if dist.get_rank() == rank:
        try:
            logits.sum()
        except ringfx.RingfxError as error:
            heard = f"{type(error).__name__}: {error}"
    dist.barrier()
    return heard


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_split_output_touched_by_one_rank_is_an_error_and_no_hang(
    ranks2: RankPool, rank: int
) -> None:
    heard = ranks2.run(functools.partial(rank_touches_alone, rank))
    assert heard[1 - rank] is None
    text = heard[rank]
    assert text is not None
    assert text.startswith("AgreementError: ")
    assert "lm_head" in text
    assert f"ranks [{1 - rank}] did not use it within 4 s, the group's timeout" in text
    assert 'outputs="local"' in text
