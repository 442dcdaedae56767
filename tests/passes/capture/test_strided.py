"""``as_strided`` reads the elements that it reads in the unsplit program, however a rank's lie."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.strided import as_views, by_index
from tests.support.split_here import split_here

Tensor = torch.Tensor
DRAWS = 4000


def test_views_and_an_index_read_what_as_strided_reads() -> None:
    draw = random.Random(0)
    views = refused = 0
    for _ in range(DRAWS):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        start = draw.choice((0, 3))
        lies = torch.arange(2000.0)[start : start + math.prod(shape)].reshape(shape)
        x = lies.permute(draw.sample(range(len(shape)), len(shape)))
        dims = range(draw.randint(0, 5))
        size = [draw.randint(1, 4) for _ in dims]
        stride = [draw.choice((0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20)) for _ in dims]
        offset = draw.choice((None, start + draw.randint(0, 4)))
        try:
            found = as_views(x, size, stride, offset)
        except CaptureRefused:
            refused += 1
            continue
        expected = x.as_strided(size, stride, start if offset is None else offset)
        if found is not NotImplemented:
            views += 1
            assert torch.equal(found, expected)
        assert torch.equal(by_index(x, size, stride, offset), expected)
    assert min(views, refused) > DRAWS // 5


WINDOW, WIDTH = 4, 8


def chunks(y: Tensor) -> Tensor:
    """Windows of twice four tokens, each half of it in the next too, as Longformer cuts them."""
    z = y.view(len(y), -1, 2 * WINDOW, WIDTH)
    size, stride = list(z.size()), list(z.stride())
    size[1], stride[1] = 2 * size[1] - 1, stride[1] // 2
    c = z.as_strided(size, stride)
    return (c @ c.mT).softmax(-1).sum((1, 2))


def of_heads(y: Tensor) -> Tensor:
    return chunks(torch.cat([y.view(len(y), -1, 2, 4).transpose(1, 2).flatten(0, 1)] * 2, -1))


def tokens_first(y: Tensor) -> Tensor:
    """Two neighbours each of a tensor whose memory has the batch outside."""
    z = y.transpose(0, 1)
    (n, b, d), (by_token, by_batch, by_feature) = z.shape, z.stride()
    pairs = z.as_strided((n - 1, 2, b, d), (by_token, by_token, by_batch, by_feature))
    return pairs.cos().sum((0, 1))


def padded(y: Tensor) -> Tensor:
    z = torch.nn.functional.pad(y, (0, 0, WINDOW, WINDOW), value=-1.0)
    a, b, c = z.stride()
    return z.as_strided((len(y), y.shape[1] // WINDOW, 3 * WINDOW, WIDTH), (a, WINDOW * b, b, c))


def every_other(y: Tensor) -> Tensor:
    a, b, c = y.stride()
    return y.as_strided((len(y), y.shape[1] // 2, WIDTH), (a, 2 * b, c), b).tanh()


def diagonals(y: Tensor) -> Tensor:
    """No axes: a step that is no multiple of the next."""
    return y.as_strided((3, 5, 2), (WIDTH + 1, 3, 2)).sin()


def repeated(y: Tensor) -> Tensor:
    return y.as_strided((2, *y.shape), (0, *y.stride())).sum(0)


def pooled(y: Tensor) -> Tensor:
    """Torch's own pool, which changes the strides of its result in place."""
    return torch.nn.functional.adaptive_avg_pool1d(y.transpose(1, 2), 1).flatten(1)


SPELLINGS = (chunks, of_heads, tokens_first, padded, every_other, diagonals, repeated, pooled)


class Reads(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.inner = read, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return self.read(y), y.tanh()


@pytest.mark.parametrize(("ranks", "length"), [(2, 16), (3, 24), (2, 40)])
@pytest.mark.parametrize("read", SPELLINGS)
def test_split_and_unsplit_read_the_same(
    read: Callable[[Tensor], Tensor], ranks: int, length: int
) -> None:
    x = torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(1))
    assert split_here(Reads(read), [x], ranks, on_unsupported="gather").worst < 1e-12


def beyond(y: Tensor) -> Tensor:
    return y[:, :8].as_strided(y.shape, y.stride())


def written(y: Tensor) -> Tensor:
    y = y.clone()
    y.as_strided((3, 5, 2), (WIDTH + 1, 3, 2)).mul_(2.0)
    return y


@pytest.mark.parametrize(
    ("read", "text"), [(beyond, "Do: take slices"), (written, "which has no inverse")]
)
def test_what_is_of_other_memory_or_written_is_refused(
    read: Callable[[Tensor], Tensor], text: str
) -> None:
    with pytest.raises(CaptureRefused, match=text):
        split_here(Reads(read), [torch.randn(3, 16, WIDTH)], 2, on_unsupported="gather")
