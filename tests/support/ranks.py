"""The ranks that tests borrow: ``LocalRanks``, each call of which finds a fresh compiler."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ringfx.comm.local_ranks import LocalRanks
from ringfx.errors import CommunicationError as RankError

__all__ = ["RankError", "RankPool", "avoid_broken_kernels", "error_text", "raises"]


class RankPool(LocalRanks):
    """Gloo ranks; every call has the same random seed and nothing that was compiled before."""

    def __init__(
        self, world_size: int, *, timeout_s: float = 600.0, collective_timeout_s: float = 240.0
    ) -> None:
        super().__init__(
            world_size,
            timeout_s=timeout_s,
            collective_timeout_s=collective_timeout_s,
            before_call=_prepare,
        )


def _prepare() -> None:
    avoid_broken_kernels()
    torch.compiler.reset()
    torch.manual_seed(0)


def avoid_broken_kernels() -> None:
    """Lets unsplit models run where ATEN_CPU_CAPABILITY makes a lesser processor of this one.

    On processors with matrix units torch's fused attention fails there in bfloat16, since it asks
    oneDNN for them; and Inductor takes programs of the real processor from its cache, which the
    lesser one's headers refuse.
    """
    if played := os.environ.get("ATEN_CPU_CAPABILITY"):
        own_cache = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{played}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_cache))
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # read when oneDNN is first asked


def error_text(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """``Type: text`` of what the call raises, or None: a result that a rank can send home.

    A test of a refusal runs this on the ranks, so that the expected error does not cost the pool.
    """
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def raises(pool: RankPool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """The error text of every rank; fails if a rank raises nothing."""
    texts = pool.run(error_text, function, *args, **kwargs)
    silent = [rank for rank, text in enumerate(texts) if text is None]
    assert not silent, f"ranks {silent} raised nothing; the others: {texts}"
    return texts
