"""The command ``ringfx``: see the plan of a model before any device is rented."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ringfx.cli import options as o
from ringfx.cli.spelling import options_of
from ringfx.errors import RingfxError
from ringfx.units.argument import spelled
from ringfx.units.columns import wrapped

__all__ = ["app", "in_columns", "main"]

USER_MISTAKE = 2
"""Exit code of every error that the user can correct."""

DIFFERENT = 1
"""Exit code of a comparison that found a difference."""

app = typer.Typer(
    name="ringfx",
    help="Split the sequence of any PyTorch model over many devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _ringfx(context: typer.Context) -> None:
    """Split the sequence of any PyTorch model over many devices."""
    commands = getattr(context.command, "commands", {})
    command = commands.get(context.invoked_subcommand)
    if command is not None:
        context.with_resource(spelled(options_of(command.params)))


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
    compiler: o.PlannedCompiler = "inductor",
    token_dims: o.TokenDims = None,
    train: o.Train = True,
    labels: o.Labels = True,
    dtype: o.Dtype = None,
    autocast: o.Autocast = None,
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
            train=train, labels=labels, dtype=dtype, autocast=autocast, hf=hf, strict=strict,
            chunks=chunks, recompute=recompute, offload=offload, head_groups=head_groups,
            compiler=compiler, token_dims=token_dims or [],
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
    seq_len: o.SeqLen = None,
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

        run(
            target, seq_len=seq_len, batch_size=batch_size, train=train, dtype=dtype, hf=hf,
            strict=strict, as_json=as_json, rules=rules,
        )  # fmt: skip


@app.command()
def verify(
    target: o.Target,
    seq_len: o.SeqLen = None,
    world_size: o.RanksHere = 2,
    batch_size: o.Sequences = 1,
    reduce: o.Reduce = False,
    gpu_memory: o.GpuMemory = None,
    strategy: o.Strategy = None,
    profile: o.Profile = None,
    shard_states: o.ShardStates = False,
    chunks: o.Chunks = "auto",
    recompute: o.Recompute = "auto",
    offload: o.Offload = "auto",
    head_groups: o.HeadGroups = "auto",
    token_dims: o.TokenDims = None,
    compiler: o.Compiler = "aot_eager",
    narrow: o.Narrow = "bfloat16",
    train: o.Train = True,
    labels: o.Labels = True,
    hf: o.HuggingFace = False,
    strict: o.Strict = False,
    strategies: o.Strategies = None,
    rules: o.Rules = None,
) -> None:
    """Compare a model split over ranks of this machine's CPU with itself unsplit, in float64.

    Outputs, loss and every gradient. Exit code 1 if something differs; the report says where first.
    """
    with _one_line_errors():
        from ringfx.cli.plan import number_or_name, strategy_choice, token_dims_of
        from ringfx.cli.tables import rules_of, strategies_of
        from ringfx.cli.verify import Asked, run

        options = {
            "gpu_memory": gpu_memory, "strategy": strategy_choice(strategy or []),
            "profile": profile, "shard_states": shard_states, "chunks": number_or_name(chunks),
            "recompute": recompute, "offload": offload,
            "head_groups": number_or_name(head_groups), "compiler": compiler, "strict": strict,
            "token_dims": token_dims_of(token_dims or []),
            "strategies": strategies_of(strategies), "rules": rules_of(rules),
        }  # fmt: skip
        found = run(
            Asked(
                target=target, seq_len=seq_len, batch_size=batch_size, world_size=world_size,
                reduce=reduce, train=train, labels=labels, hf=hf, narrow=narrow, options=options,
            )
        )  # fmt: skip
    if not found.ok:
        raise typer.Exit(DIFFERENT)


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
        text = "\n".join([f"ringfx: {error}", *getattr(error, "__notes__", ())])
        print(in_columns(text) if sys.stderr.isatty() else text, file=sys.stderr)
        raise typer.Exit(USER_MISTAKE) from error


def in_columns(text: str) -> str:
    """Lines that a terminal does not break in the middle of a word.

    >>> print(in_columns("needs more\\n  Do: " + "give more memory, " * 5 + "or less work"))
    needs more
      Do: give more memory, give more memory, give more memory, give more memory,
        give more memory, or less work
    """
    lines = text.split("\n")
    indents = [len(line) - len(line.lstrip()) for line in lines]
    return "\n".join(
        part
        for line, indent in zip(lines, indents, strict=True)
        for part in wrapped([line.strip()], indent)
    )


if __name__ == "__main__":
    main()
