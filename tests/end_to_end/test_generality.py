"""Models of many shapes: outputs and every gradient as unsplit, on two ranks, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from tests.models import shapes
from tests.support.harness import Case, Comparison, RankDifference, RankPool, compare_here

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor


def ids(seq_len: int, batch: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shapes.VOCAB, (batch, seq_len), generator=generator)


def one(seq_len: int = 11, batch: int = 2) -> tuple[Tensor, ...]:
    return (ids(seq_len, batch),)


def two(source: int = 13, target: int = 8) -> tuple[Tensor, ...]:
    return ids(source), ids(target, seed=4)


def embeddings(seq_len: int = 11) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(2, seq_len, shapes.HIDDEN, generator=generator).requires_grad_(),)


def plane(height: int = 5, width: int = 6) -> tuple[Tensor, ...]:
    return (torch.randn(2, height, width, shapes.HIDDEN),)


def padded(seq_len: int = 11) -> dict[str, Any]:
    padding = torch.zeros(2, seq_len, dtype=torch.bool)
    padding[1, -4:] = True
    return {"ids": ids(seq_len), "padding": padding}


def causal(seq_len: int = 11) -> dict[str, Any]:
    return {"ids": ids(seq_len), "causal": True}


def total(output: Any) -> Tensor:
    """A loss in which every element of every output counts differently."""
    leaves = torch.utils._pytree.tree_leaves(output)
    floating = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    loss = floating[0].new_zeros(())
    for x in floating:
        weights = torch.arange(x.numel(), dtype=x.dtype).view(x.shape).cos()
        loss = loss + (x * weights).square().sum() + x.mean()
    return loss


def losses_only(output: shapes.Answer) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def part(
    model: Callable[[], Any], inputs: Callable[[], Any] = one, **more: Any
) -> Mapping[str, Any]:
    return {"model": model, "inputs": inputs, "loss": total} | more


P = functools.partial
CASES: Mapping[str, Mapping[str, Any]] = {
    "one causal model": part(shapes.Causal),
    "an even length": part(shapes.Causal, P(one, 12)),
    "tied weights": part(shapes.Tied),
    "frozen parameters": part(shapes.Frozen),
    "only the head trains": part(shapes.FrozenBelow),
    "no gradients": part(shapes.Causal, backward=False),
    "fewer tokens than ranks": part(shapes.Causal, P(one, 1)),
    "two tokens": part(shapes.Causal, P(one, 2)),
    "three tokens": part(shapes.Causal, P(one, 3)),
    "batch as large as the sequence": part(shapes.Causal, P(one, 8, 8)),
    "batch of one": part(shapes.Causal, P(one, 11, 1)),
    "sequence as long as hidden": part(shapes.Causal, P(one, shapes.HIDDEN)),
    "sequence as long as the vocabulary": part(shapes.Causal, P(one, shapes.VOCAB)),
    "sequence as long as a head": part(shapes.Causal, P(one, 8)),
    "sequence as long as heads": part(shapes.Causal, P(one, 3)),
    "encoder and decoder": part(shapes.EncoderDecoder, two),
    "encoder and decoder of equal length": part(shapes.EncoderDecoder, P(two, 12, 12)),
    "one target token": part(shapes.EncoderDecoder, P(two, 9, 1)),
    "one source token": part(shapes.EncoderDecoder, P(two, 1, 9)),
    "gradients of embeddings given as input": part(shapes.FromEmbeddings, embeddings),
    "sequence first": part(shapes.SequenceFirst),
    "nn.TransformerEncoder": part(shapes.TorchEncoder),
    "nn.TransformerEncoder, sequence first": part(P(shapes.TorchEncoder, False)),
    "nn.TransformerEncoder, causal": part(shapes.TorchEncoder, causal),
    "nn.TransformerEncoder, padding": part(P(shapes.TorchEncoder, norm_first=True), padded),
    "nn.Transformer": part(shapes.TorchTransformer, two),
    "nn.Transformer, asked whether its mask is causal": part(
        P(shapes.TorchTransformer, says_causal=None), two
    ),
    "experts": part(shapes.Experts),
    "class token and pooling": part(shapes.Pooled),
    "two token axes in a tensor": part(shapes.Axial, plane),
    "two token axes of equal length": part(shapes.Axial, P(plane, 6, 6)),
    "latents": part(shapes.Latents),
    "operators along tokens": part(shapes.Neighbours),
    "pairs of tokens merged": part(shapes.Shortened, P(one, 12)),
    "statistics over tokens": part(shapes.Gated),
    "a window that attends": part(P(shapes.Cropped, 1, None)),
    "a window that attends, even length": part(P(shapes.Cropped, 1, None), P(one, 12)),
    "a window from the start": part(P(shapes.Cropped, 0, -1), P(one, 12)),
    "the last tokens read all": part(P(shapes.LastReads, 4)),
    "the last tokens read all, contiguous": part(P(shapes.LastReads, 4, causal=False)),
    "the last token reads all": part(P(shapes.LastReads, 1)),
    "all but the first token read all": part(P(shapes.LastReads, 11), P(one, 12)),
    "learned keys in front": part(shapes.Memory),
    "halves": part(shapes.Halves, P(one, 12)),
    "blocks of tokens": part(shapes.Blocked, P(one, 12)),
    "single tokens": part(shapes.Picks),
    "tokens repeated": part(shapes.Repeated),
    "a dataclass of lists": part(shapes.Structured),
    "several losses, outputs untouched": part(shapes.Structured, loss=losses_only),
    "a dictionary": part(shapes.Dictionary),
}


def case(name: str) -> Case:
    fields: dict[str, Any] = dict(CASES[name])
    options = {"compiler": "eager", "on_unsupported": "gather"}
    return Case(dtype=torch.float64, options=options, label=name, **fields)


def outcomes(names: Sequence[str]) -> dict[str, RankDifference | str]:
    """What this rank finds for each case: the differences, or the error that it met."""
    return {name: outcome(name) for name in names}


def outcome(name: str) -> RankDifference | str:
    try:
        (found,) = compare_here(case(name)).ranks
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return found


FEW = list(CASES)[::3]
OTHERS = [name for name in CASES if name not in FEW]


@pytest.fixture(scope="module")
def few(ranks2: RankPool) -> Sequence[Mapping[str, RankDifference | str]]:
    """All in one call of the pool, since a call costs a new process group."""
    return ranks2.run(outcomes, FEW)


@pytest.fixture(scope="module")
def others(ranks2: RankPool) -> Sequence[Mapping[str, RankDifference | str]]:
    return ranks2.run(outcomes, OTHERS)


@pytest.mark.parametrize("name", FEW)
def test_results_are_those_of_the_unsplit_model(
    few: Sequence[Mapping[str, RankDifference | str]], name: str
) -> None:
    check(few, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_results_of_the_others_are_those_of_the_unsplit_model(
    others: Sequence[Mapping[str, RankDifference | str]], name: str
) -> None:
    check(others, name)


def check(found: Sequence[Mapping[str, RankDifference | str]], name: str) -> None:
    ranks = tuple(by_rank[name] for by_rank in found)
    differences = tuple(r for r in ranks if isinstance(r, RankDifference))
    assert len(differences) == len(ranks), ranks
    Comparison(label=name, dtype=torch.float64, ranks=differences).check()
    assert differences[0].strategies, "no attention was found"
