"""One rank's share of an attention: tokens, elements, bytes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from ringfx.cost_model.prediction import terms
from ringfx.ir.dilation import AnyLayout, HeadPart, KeptLayout, KeptRows, head_parts, layout_of
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.values import AttentionSite
from ringfx.ops.tiling.head_groups import MOST_GROUPS, head_groups
from ringfx.ops.tiling.tile_sizes import stored_tile

__all__ = ["Local", "local_share"]


@dataclass(frozen=True, kw_only=True)
class Local:
    """Sizes of one rank's tensors, padding included."""

    site: AttentionSite
    world_size: int
    layout: LayoutKind
    q_len: int
    kv_len: int
    head_groups: int = 0
    """Groups of heads that the strategy was asked for; 0: as many as it takes by itself."""
    kept: KeptRows | None = None
    """The rows of a longer sequence that these are: a part of a dilated attention."""

    @property
    def q_layout(self) -> AnyLayout:
        return layout_of(self.layout, self.site.q_len, self.world_size, self.kept)

    @property
    def kv_layout(self) -> AnyLayout:
        return layout_of(self.layout, self.site.kv_len, self.world_size, self.kept)

    @property
    def parts(self) -> tuple[tuple[int, Local], ...]:
        """Of a dilated attention its parts, and how many are alike; else itself."""
        site = self.site
        if not site.spec.branches:
            return ((1, self),)
        parts = head_parts(site.spec.branches, site.q_len, site.heads, site.kv_heads)
        alike: dict[tuple[int, ...], list[HeadPart]] = {}
        for part in parts:
            key = (part.rows.segment, part.rows.rate, len(part.heads), len(part.kv_heads))
            alike.setdefault(key, []).append(part)
        return tuple((len(found), self._part(found[0])) for found in alike.values())

    @property
    def is_one_run(self) -> bool:
        """Whether the kept rows lie at even distances among a rank's tokens."""
        layout = self.q_layout
        if not isinstance(layout, KeptLayout):
            return True
        runs = tuple(itertools.islice(layout.strided_runs(0), 2))
        return len(runs) == 1 and runs[0].count == layout.local_length

    def keeps_all_of(self, local: Local) -> bool:
        """Whether this part has all rows of all heads."""
        return self.site.heads == local.site.heads and self.q_len == local.q_len and self.is_one_run

    def _part(self, part: HeadPart) -> Local:
        spec = self.site.spec.of_rows(part.rows)
        heads, kv_heads = len(part.heads), len(part.kv_heads)
        site = replace(self.site, spec=spec, heads=heads, kv_heads=kv_heads)
        length = layout_of(self.layout, spec.q_len, self.world_size, part.rows).local_length
        return replace(self, site=site, q_len=length, kv_len=length, kept=part.rows)

    @property
    def itemsize(self) -> int:
        return terms.itemsize(self.site)

    @property
    def accumulator_bytes(self) -> int:
        return terms.accumulator_bytes(self.site)

    @property
    def rows(self) -> int:
        """Rows of the output over batch and heads: one logsumexp each."""
        return self.site.batch * self.site.heads * self.q_len

    @property
    def q_items(self) -> int:
        return self.rows * self.site.head_dim

    @property
    def out_items(self) -> int:
        return self.rows * self.site.v_head_dim

    @property
    def k_items(self) -> int:
        return self.site.batch * self.site.kv_heads * self.kv_len * self.site.head_dim

    @property
    def v_items(self) -> int:
        return self.site.batch * self.site.kv_heads * self.kv_len * self.site.v_head_dim

    @property
    def kv_items(self) -> int:
        return self.k_items + self.v_items

    @property
    def kv_bytes(self) -> int:
        """Of its keys and values, in their dtype."""
        return self.kv_items * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of the sums of their gradients."""
        return self.kv_items * self.accumulator_bytes

    @property
    def stored_tile(self) -> int:
        """Side of the tiles of a kernel that keeps its scores."""
        return stored_tile(self.site.device, self.site.batch * self.site.heads)

    @property
    def saved_bytes(self) -> int:
        """q, k, v and the output in their dtype and the logsumexp, kept for backward."""
        items = self.q_items + self.kv_items + self.out_items
        saved = items * self.itemsize + self.rows * self.accumulator_bytes
        return saved if self.site.trains else 0

    @property
    def result_bytes(self) -> int:
        """The output and the logsumexp, kept for backward even where the rest is computed again."""
        kept = self.rows * self.accumulator_bytes if self.site.trains else 0
        return self.output_bytes + kept

    @property
    def output_bytes(self) -> int:
        """The output, kept for backward."""
        return self.out_items * self.itemsize if self.site.trains else 0

    def groups(self, least_bytes: int, most: int = MOST_GROUPS) -> int:
        """Groups of heads that are sent one by one, each of at least so many bytes of K and V; or
        as many as were asked for."""
        site, dtype = self.site, getattr(torch, self.site.dtype)
        q, k, v = (
            torch.empty(site.batch, heads, tokens, dim, dtype=dtype, device="meta")
            for heads, tokens, dim in (
                (site.heads, self.q_len, site.head_dim),
                (site.kv_heads, self.kv_len, site.head_dim),
                (site.kv_heads, self.kv_len, site.v_head_dim),
            )
        )
        return len(head_groups(q, k, v, least_bytes=least_bytes, most=most, asked=self.head_groups))


def local_share(site: AttentionSite, world_size: int) -> Local:
    """The tokens of one rank: zigzag where rows keep different numbers of keys.

    Of a local attention, what it has of the batch, or of the heads where these are split.
    """
    if site.is_local and world_size > 1:
        whole = replace(site, is_local=False)
        return local_share(_part_of_batch(whole, world_size), 1)
    layout: LayoutKind = "contiguous" if site.balanced else "zigzag"
    return Local(
        site=site,
        world_size=world_size,
        layout=layout,
        q_len=Layout(layout, site.q_len, world_size).local_length,
        kv_len=Layout(layout, site.kv_len, world_size).local_length,
    )


def _part_of_batch(site: AttentionSite, world_size: int) -> AttentionSite:
    if site.batch >= world_size:
        return replace(site, batch=-(-site.batch // world_size))
    heads, kv_heads = (-(-n // world_size) for n in (site.heads, site.kv_heads))
    return replace(site, heads=heads, kv_heads=kv_heads)
