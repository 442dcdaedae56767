"""``ringfx bench``: each strategy's predicted time beside the time it takes on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ringfx.cli.calibrate import check_device
from ringfx.cli.model_target import floating_dtype
from ringfx.cost_model import load_profile, parse_tokens
from ringfx.cost_model.calibration.bench import Sample, Timing, bench, bench_site, regret
from ringfx.errors import InvalidArgument
from ringfx.ir.values import AttentionSite
from ringfx.units.columns import table_lines
from ringfx.units.format import format_bytes, format_ms

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
    _check(asked, ranks)
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


def _check(asked: Attention, ranks: int) -> None:
    """Before ranks are started, which would all say the same."""
    check_device(asked.device, ranks)
    floating_dtype(asked.dtype)
    if asked.heads % (asked.kv_heads or asked.heads):
        raise InvalidArgument(
            f"{asked.heads} query heads for {asked.kv_heads} key/value heads. Do: use a number of"
            " query heads that the key/value heads divide."
        )


def _site(asked: Attention) -> AttentionSite:
    return bench_site(
        tokens=parse_tokens(asked.tokens),
        heads=asked.heads,
        kv_heads=asked.kv_heads,
        head_dim=asked.head_dim,
        batch=asked.batch,
        dtype=asked.dtype,
        causal=asked.causal,
        window=asked.window,
        train=asked.train,
        device=asked.device,
    )


def _lines(timings: tuple[Timing, ...]) -> list[str]:
    titles = (
        "strategy",
        "predicted",
        "measured",
        "A/A",
        "error",
        "forward",
        "backward",
        "workspace",
    )
    rows = [
        (
            timing.prediction.strategy,
            format_ms(timing.prediction.total_ms),
            format_ms(timing.median_ms),
            f"{max(sample.again for sample in timing.samples):.0%}",
            f"{timing.error:+.0%}",
            _beside(timing.prediction.forward_ms, timing.forward),
            _beside(timing.prediction.backward_ms, timing.backward),
            format_bytes(timing.prediction.workspace_bytes),
        )
        for timing in timings
    ]
    chosen = timings[0].prediction.strategy
    best = min(timings, key=lambda t: t.median_ms).prediction.strategy
    words = f"chosen {chosen}, best measured {best}: regret {regret(timings):.2f}"
    return [*table_lines([titles, *rows], left=(0,)), words]


def _beside(predicted_ms: float, measured: Sample | None) -> str:
    """Predicted / measured."""
    if measured is None:
        return ""
    return f"{format_ms(predicted_ms)} / {format_ms(measured.median_ms)}"
