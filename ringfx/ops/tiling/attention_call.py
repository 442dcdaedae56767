"""One attention call on one rank, as the strategies see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ringfx.comm.process_group import Ranks
from ringfx.comm.stats import LayerStats
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.dilation import AnyLayout, KeptRows, layout_of
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ops.kernels.kernel import Kernel
from ringfx.ops.kernels.logsumexp import logsumexp_dtype
from ringfx.ops.tiling.head_groups import HeadGroup
from ringfx.ops.tiling.pieces import Run, Tiling, runs_of

__all__ = ["Problem"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What is computed, among whom, how it lies, and with what."""

    spec: AttentionSpec
    inputs: Sequence[torch.Tensor]
    """Tensors that the tile functions read, whole; without the sinks and the seed."""
    ranks: Ranks
    layout: LayoutKind
    kernel: Kernel
    tiling: Tiling
    stats: LayerStats
    seed: torch.Tensor | None = None
    """int64 [1] that decides what dropout drops, or [1 + B] with the numbers that the entries of
    the batch have among all; None where nothing is dropped."""
    bias_grads: tuple[int, ...] = ()
    """Positions of the inputs whose gradient the backward must give."""
    first_head: int = 0
    """Global index of the first local head: not 0 where heads are split."""
    head_groups: int = 0
    """Groups of heads that the strategy was asked for; 0: as many as it takes by itself."""
    rows: KeptRows | None = None
    """The queries and keys are these rows of a longer sequence, which is what lies on the ranks."""
    whole_queries: bool = False
    """Every rank has all queries, and gives the output and the gradient of all of them."""

    @property
    def q_layout(self) -> AnyLayout:
        if self.whole_queries:
            return Layout("contiguous", self.spec.q_len, 1)
        return self._layout_of(self.spec.q_len)

    @property
    def kv_layout(self) -> AnyLayout:
        return self._layout_of(self.spec.kv_len)

    def _layout_of(self, length: int) -> AnyLayout:
        return layout_of(self.layout, length, self.ranks.size, self.rows)

    def logsumexp_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What logsumexps are kept in, of queries of a dtype."""
        return logsumexp_dtype(dtype, has_bias=self.spec.bias is not None)

    def q_runs(self, rank: int) -> tuple[Run, ...]:
        return runs_of(self.q_layout, 0 if self.whole_queries else rank)

    def is_query(self, device: torch.device) -> torch.Tensor:
        """bool [local queries]: which are no padding."""
        layout = self.q_layout
        rank = 0 if self.whole_queries else self.ranks.rank
        return layout.positions(rank, device) < layout.length

    def k_runs(self, rank: int) -> tuple[Run, ...]:
        return runs_of(self.kv_layout, rank)

    def heads(self, group: HeadGroup) -> Problem:
        """The same for a group of the local heads."""
        return replace(self, first_head=self.first_head + group.first_head)
