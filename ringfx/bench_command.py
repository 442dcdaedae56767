"""``ringfx bench``: each strategy's predicted time beside the time it takes on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ringfx import tiles
from ringfx.cost_model import load_profile, parse_tokens
from ringfx.cost_model.bench import Timing, bench, regret
from ringfx.passes.values import AttentionSite
from ringfx.plan_text import format_bytes, format_ms, table_lines
from ringfx.spec import AttentionSpec

__all__ = ["Attention", "run"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention that is measured, as options of the command."""

    tokens: str
    batch: int
    heads: int
    kv_heads: int | None
    head_dim: int
    dtype: str
    causal: bool
    window: int | None
    train: bool
    device: str


def run(asked: Attention, *, ranks: int, profile: str | None, rounds: int) -> None:
    """Measure and print.

    Raises
    ------
    RingfxError
        A number cannot be, there is no such profile, or a rank failed.
    """
    site = _site(asked)
    found = load_profile(profile, device=site.device)
    with Console(stderr=True).status("starting ranks") as status:
        timings = bench(
            site,
            num_ranks=ranks,
            profile=found,
            rounds=rounds,
            progress=lambda what, done, total: status.update(what),
        )
    if timings is None:
        return
    print(f"{site.mask_words}, {site.q_len:,} tokens, {ranks} ranks, profile {found.name}")
    print("\n".join(_lines(timings)))
    print("\n".join(f"note: {note}" for note in found.notes))


def _site(asked: Attention) -> AttentionSite:
    tokens = parse_tokens(asked.tokens)
    band = None
    if asked.window is not None:
        band = ("gt", tiles.K, ("sub", tiles.Q, ("const", asked.window)))
    keep = tiles.conjunction(tiles.CAUSAL if asked.causal else None, band)
    spec = AttentionSpec(scale=asked.head_dim**-0.5, q_len=tokens, kv_len=tokens, keep=keep)
    return AttentionSite(
        node="bench",
        name="bench",
        source="command line",
        found_by="bench",
        spec=spec,
        mask_words=tiles.describe(keep),
        density=tiles.density(keep, tokens, tokens),
        balanced=tiles.is_balanced(keep, tokens, tokens),
        batch=asked.batch,
        heads=asked.heads,
        kv_heads=asked.kv_heads or asked.heads,
        head_dim=asked.head_dim,
        v_head_dim=asked.head_dim,
        dtype=asked.dtype,
        device=asked.device,
        trains=asked.train,
    )


def _lines(timings: tuple[Timing, ...]) -> list[str]:
    titles = ("strategy", "predicted", "measured", "spread", "error", "workspace")
    rows = [
        (
            timing.prediction.strategy,
            format_ms(timing.prediction.total_ms),
            format_ms(timing.median_ms),
            f"{timing.spread:.0%}",
            f"{timing.error:+.0%}",
            format_bytes(timing.prediction.workspace_bytes),
        )
        for timing in timings
    ]
    chosen = timings[0].prediction.strategy
    best = min(timings, key=lambda t: t.median_ms).prediction.strategy
    words = f"chosen {chosen}, best measured {best}: regret {regret(timings):.2f}"
    return [*table_lines([titles, *rows], left=(0,)), words]
