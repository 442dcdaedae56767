"""The held-out cases: none has a length, head count and head dim that a calibration fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringfx.cost_model.calibration.bench import bench_site
from ringfx.cost_model.calibration.records import AttentionRecord
from ringfx.ir.values import AttentionSite

__all__ = ["CASES", "NUM_RANKS", "Case", "case_of"]

NUM_RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention over one link; no two differ in ``train`` alone."""

    link: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str = "causal"
    batch: int = 1
    dtype: str = "float32"
    train: bool = True

    @property
    def site(self) -> AttentionSite:
        _, _, window = self.mask.partition("window ")
        return bench_site(
            tokens=self.tokens,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            batch=self.batch,
            dtype=self.dtype,
            causal=self.mask.startswith("causal"),
            window=int(window) if window else None,
            train=self.train,
        )

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        mode = "" if self.train else ", forward"
        return f"{batch}{self.tokens} tokens, {heads}, {self.mask}, {self.dtype}{mode}, {self.link}"


def _cases(link: str, train: bool, mask: str, sizes: str, **more: Any) -> Iterator[Case]:
    """From ``tokens x heads/kv_heads x head_dim`` words."""
    for words in sizes.split():
        tokens, heads, head_dim = words.split("x")
        q_heads, _, kv_heads = heads.partition("/")
        yield Case(
            link=link,
            tokens=int(tokens),
            heads=int(q_heads),
            kv_heads=int(kv_heads or q_heads),
            head_dim=int(head_dim),
            mask=mask,
            train=train,
            **more,
        )


CASES: Sequence[Case] = [
    *_cases("loopback", True, "causal", "700x4x80 1500x6x80 1000x12x48 2200x4/2x96 3000x6/2x80"),
    *_cases("loopback", True, "causal", "3000x6x48 5000x4x40 5000x2x96 7000x2/1x80 6000x3x40"),
    *_cases("loopback", True, "causal", "9000x2x48 400x12x80"),
    *_cases("loopback", True, "full", "700x4x80 1500x6/3x48 1800x6/2x80 2600x4x96 3500x3x48"),
    *_cases("loopback", True, "full", "4500x2x80 2000x10x48"),
    *_cases("loopback", True, "causal, window 300", "3000x6x80 5000x6x48"),
    *_cases("loopback", True, "causal, window 700", "6000x4/2x80 12000x2x48"),
    *_cases("loopback", True, "causal, window 1500", "9000x2x80"),
    *_cases("loopback", False, "causal", "1700x6x80 3200x6x48 5000x4/2x96 9000x4x40 12000x2x80"),
    *_cases("loopback", False, "full", "2700x4x96 4500x4/1x48 6000x3x80"),
    *_cases("loopback", False, "causal, window 600", "9000x4x80"),
    *_cases("loopback", True, "causal", "1500x6x80 3000x4x96 5000x2x48", dtype="bfloat16"),
    *_cases("loopback", True, "full", "1800x4/2x80 2600x3x48", dtype="bfloat16"),
    *_cases("loopback", False, "causal", "5000x4x80", dtype="bfloat16"),
    *_cases("loopback", False, "causal, window 700", "6000x4x48", dtype="bfloat16"),
    *_cases("loopback", True, "causal", "1000x4x80", batch=3),
    *_cases("loopback", True, "causal", "2000x4x48", batch=2),
    *_cases("loopback", True, "full", "900x6/2x80", batch=2),
    *_cases("1gbit", True, "causal", "1000x4x80 2000x6x80 2000x6/1x80 3000x4x48 5000x4/1x80"),
    *_cases("1gbit", True, "causal", "5000x2x80"),
    *_cases("1gbit", True, "full", "1500x4/2x80 2500x4x48"),
    *_cases("1gbit", False, "causal", "3000x6x80 5000x6/1x48"),
    *_cases("1gbit", True, "causal, window 300", "5000x4x48 6000x4/1x80"),
    *_cases("100mbit", True, "causal", "1000x4x80 1500x6/1x80 3000x4/1x80 3000x4x40"),
    *_cases("100mbit", False, "causal", "2000x6/2x80 3000x4x48"),
    *_cases("100mbit", False, "full", "2500x4/1x80"),
    *_cases("100mbit", True, "causal, window 300", "3000x4/1x80"),
]


def _key(x: Case | AttentionRecord) -> tuple[object, ...]:
    tokens = x.tokens if isinstance(x, Case) else x.q_len
    return x.link, tokens, x.heads, x.kv_heads, x.head_dim, x.mask, x.batch, x.dtype


BY_KEY: Mapping[tuple[object, ...], Case] = {_key(case): case for case in CASES}
assert len(BY_KEY) == len(CASES), "every case has records of its own"


def case_of(record: AttentionRecord) -> Case:
    """The case that a record belongs to."""
    return BY_KEY[_key(record)]
