"""The command ``ringfx``: see the plan of a model before any device is rented."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ringfx.cli import options as o
from ringfx.errors import RingfxError

__all__ = ["app", "main"]

USER_MISTAKE = 2
"""Exit code of every error that the user can correct."""

app = typer.Typer(
    name="ringfx",
    help="Split the sequence of any PyTorch model over many devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _ringfx() -> None:
    """Split the sequence of any PyTorch model over many devices."""


@app.command()
def plan(
    target: o.Target,
    seq_len: o.SeqLen = None,
    world_size: o.WorldSize = None,
    batch_size: o.Sequences = 1,
    gpu_memory: o.GpuMemory = None,
    strategy: o.Strategy = None,
    profile: o.Profile = None,
    optimizer: o.Optimizer = "none",
    shard_states: o.ShardStates = False,
    state_ranks: o.StateRanks = None,
    param_dtype: o.ParamDtype = None,
    chunks: o.Chunks = "auto",
    recompute: o.Recompute = "auto",
    offload: o.Offload = "auto",
    head_groups: o.HeadGroups = "auto",
    train: o.Train = True,
    labels: o.Labels = True,
    dtype: o.Dtype = None,
    hf: o.HuggingFace = False,
    strict: o.Strict = False,
    strategies: o.Strategies = None,
    rules: o.Rules = None,
    as_json: o.AsJson = False,
    html: o.Html = None,
    explain: o.Explain = None,
    what_if: o.WhatIf = None,
    sweep: o.Sweep = None,
    max_seq_len: o.MaxSeqLen = False,
    diff: o.Diff = None,
) -> None:
    """Print the strategy of each attention layer, its cost, and the reason.

    Runs on fake tensors: needs no device, no process group and no memory for the model.
    """
    with _one_line_errors():
        from ringfx.cli.plan import Request, View, run
        from ringfx.cli.tables import rules_of, strategies_of

        request = Request(
            target=target, seq_len=seq_len, world_size=world_size, batch_size=batch_size,
            gpu_memory=gpu_memory, strategy=strategy or [], profile=profile, optimizer=optimizer,
            train=train, labels=labels, dtype=dtype, hf=hf, strict=strict, chunks=chunks,
            recompute=recompute, offload=offload,
            head_groups=head_groups,
            shard_states=state_ranks or shard_states, param_dtype=param_dtype,
            strategies=strategies_of(strategies), rules=rules_of(rules),
        )  # fmt: skip
        view = View(
            as_json=as_json, html=html, explain_layer=explain, what_if=what_if, sweep=sweep,
            max_seq_len=max_seq_len, diff=diff,
        )  # fmt: skip
        run(request, view)


@app.command()
def explain(
    target: o.Target,
    seq_len: o.SeqLen = "4k",
    batch_size: o.Sequences = 1,
    train: o.Train = True,
    dtype: o.Dtype = None,
    hf: o.HuggingFace = False,
    strict: o.Strict = False,
    rules: o.Rules = None,
    as_json: o.AsJson = False,
) -> None:
    """Print each attention of a model: its formula, and how it was found. Print near misses too.

    Runs on fake tensors and chooses no strategy: it works even if no plan can be made.
    """
    with _one_line_errors():
        from ringfx.cli.explain import run

        assert seq_len is not None, "it has a default"
        run(
            target, seq_len=seq_len, batch_size=batch_size, train=train, dtype=dtype, hf=hf,
            strict=strict, as_json=as_json, rules=rules,
        )  # fmt: skip


@app.command()
def calibrate(
    ranks: o.Ranks = 2,
    device: o.Device = "cpu",
    quick: o.Quick = False,
    name: o.Name = None,
    out: o.Out = None,
    records: o.Records = None,
) -> None:
    """Measure this machine in a few minutes, and write a profile for predictions.

    Under torchrun every rank takes part, and the links between machines are measured.
    """
    with _one_line_errors():
        from ringfx.cli.calibrate import run

        run(ranks=ranks, device=device, quick=quick, name=name, out=out, records=records)


@app.command()
def bench(
    tokens: o.Tokens = "4k",
    heads: o.Heads = 8,
    kv_heads: o.HeadsOfKV = None,
    head_dim: o.HeadDim = 64,
    batch: o.Batch = 1,
    dtype: o.Dtype = "float32",
    causal: o.Causal = True,
    window: o.Window = None,
    train: o.Train = True,
    ranks: o.Ranks = 2,
    device: o.Device = "cpu",
    profile: o.Profile = None,
    rounds: o.Rounds = 7,
) -> None:
    """Measure every strategy at one attention, and print the predictions beside it."""
    with _one_line_errors():
        from ringfx.cli.bench import Attention, run

        assert dtype is not None, "it has a default"
        asked = Attention(
            tokens=tokens, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            dtype=dtype, causal=causal, window=window, train=train, device=device,
        )  # fmt: skip
        run(asked, ranks=ranks, profile=profile, rounds=rounds)


def main() -> None:
    """Entry point of the console script."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A user error prints its text and gives exit code 2, never a traceback."""
    try:
        yield
    except RingfxError as error:
        print(f"ringfx: {error}", file=sys.stderr)
        raise typer.Exit(USER_MISTAKE) from error


if __name__ == "__main__":
    main()
