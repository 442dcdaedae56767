"""A tensor of addresses alone: whether it was read is known."""

import pytest
import torch

from ringfx.compile.untouched_memory import UntouchedMemory

GIB = 2**30


@pytest.fixture(autouse=True)
def _told() -> None:
    if not UntouchedMemory.is_told():
        pytest.skip("this system does not say which pages were touched")


def test_any_size_is_made_and_nothing_of_it_is_touched() -> None:
    made = UntouchedMemory(torch.Size([64, GIB]), torch.float32)
    assert made.tensor.shape == (64, GIB)
    assert made.tensor[3:5].stride() == (GIB, 1)
    assert not made.was_touched()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (70, 5000)])
def test_one_number_that_is_read_or_written_is_enough(shape: tuple[int, ...]) -> None:
    made = UntouchedMemory(torch.Size(shape), torch.bfloat16)
    assert not made.was_touched()
    made.tensor.sum()
    assert made.was_touched() == (made.tensor.numel() > 0)
    made.forget()
    assert not made.was_touched()
    made.tensor.fill_(1)
    assert made.was_touched() == (made.tensor.numel() > 0)
    made.forget()
    assert not made.tensor.any()
