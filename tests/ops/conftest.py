"""Machines with a GPU that tests of the CUDA kernels run on."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from ringfx.ops.kernels import cuda
from ringfx.ops.kernels.cuda import flash, xformers
from tests.ops.cuda_stand_ins import STAND_INS, XFORMERS, Card, Torch


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Torch:
    """torch's activation of FlashAttention 3 and 4, with packages that load."""
    found, module = Torch(), flash.attention
    monkeypatch.setattr(module, "current_flash_attention_impl", lambda: found.behind)
    monkeypatch.setattr(module, "activate_flash_attention_impl", found.put)
    monkeypatch.setattr(flash, "restore_flash_attention", lambda: found.put(None))
    return found


@pytest.fixture
def stand_ins(behind: Torch) -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, stand_in in STAND_INS.items():
            library.impl(name, stand_in, "CPU")
        with mock.patch.object(xformers, "_operators", return_value=XFORMERS):
            yield


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, behind: Torch) -> Iterator[Card]:
    """A Hopper card without extra packages."""
    monkeypatch.delenv(cuda.KERNEL_VARIABLE, raising=False)
    yield Card(monkeypatch)
    xformers.missing.cache_clear()
    flash._broken.cache_clear()
