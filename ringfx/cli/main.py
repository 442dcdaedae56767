"""The command ``ringfx``: see the plan of a model before any device is rented."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ringfx.errors import RingfxError

__all__ = ["app", "main"]

USER_MISTAKE = 2
"""Exit code of every error that the user can correct."""

MOST_ROWS, MOST_HERE = 2**16, 1024
"""Sequences in a batch, heads and their length; ranks that are started on one machine."""

app = typer.Typer(
    name="ringfx",
    help="Split the sequence of any PyTorch model over many devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MAKING, SHOWING = "The plan", "Output (default: the plan)"


@app.callback()
def _ringfx() -> None:
    """Split the sequence of any PyTorch model over many devices."""


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="MODULE:FACTORY, file.py:FACTORY, a Hugging Face config.json, with --hf the name"
            " of a configuration class, or a plan saved with --json.",
        ),
    ],
    seq_len: Annotated[
        str | None,
        typer.Option(help="Tokens of one sequence: 4096, 128k, 1M.", rich_help_panel=MAKING),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            help="Ranks over which the sequence is split.", min=1, max=2**30, rich_help_panel=MAKING
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(help="Sequences in the batch.", min=1, max=MOST_ROWS, rich_help_panel=MAKING),
    ] = 1,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help='Memory of one rank, such as "80GiB"; default: no limit.', rich_help_panel=MAKING
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "simple (reference ring), collective (all-gather of K/V), production (overlapped "
                'ring) or ulysses (all-to-all of heads); or "GLOB=NAME" (may be repeated). '
                "Default: auto."
            ),
            rich_help_panel=MAKING,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Profile name or file; default: the one of this device.", rich_help_panel=MAKING
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help=(
                "Optimizer whose state is counted: adamw, momentum, sgd, ..., or its bytes for "
                "each parameter."
            ),
            rich_help_panel=MAKING,
        ),
    ] = "none",
    train: Annotated[
        bool,
        typer.Option(
            "--train/--infer",
            help="Plan forward and backward, or forward only.",
            rich_help_panel=MAKING,
        ),
    ] = True,
    labels: Annotated[
        bool,
        typer.Option(
            help="Pass labels if forward accepts them (when training).", rich_help_panel=MAKING
        ),
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Floating type of the parameters, such as bfloat16.", rich_help_panel=MAKING
        ),
    ] = None,
    hf: Annotated[
        bool,
        typer.Option(
            "--hf", help="TARGET is a transformers configuration class.", rich_help_panel=MAKING
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Fail if something looks like attention and was not recognised.",
            rich_help_panel=MAKING,
        ),
    ] = False,
    strategies: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="A table with strategies of your own: ringfx.STRATEGIES | {...}.",
            rich_help_panel=MAKING,
        ),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="A table with operators of your own: ringfx.RULES | {...}.",
            rich_help_panel=MAKING,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, to save the plan.", rich_help_panel=SHOWING)
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write one page with charts to this file.", rich_help_panel=SHOWING),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="Compare all strategies for the layers that match this glob.",
            rich_help_panel=SHOWING,
        ),
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(
            help="Plan again with changes: world-size=16,link=50GB/s,seq-len=1M.",
            rich_help_panel=SHOWING,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Plan for a range of values: seq-len=8k..1M, or world-size=2,4,8.",
            rich_help_panel=SHOWING,
        ),
    ] = None,
    max_seq_len: Annotated[
        bool,
        typer.Option(
            "--max-seq-len",
            help="Find the longest sequence that fits --gpu-memory.",
            rich_help_panel=SHOWING,
        ),
    ] = False,
    diff: Annotated[
        Path | None,
        typer.Option(help="Show the differences from this saved plan.", rich_help_panel=SHOWING),
    ] = None,
) -> None:
    """Print the strategy of each attention layer, its cost, and the reason.

    Runs on fake tensors: needs no device, no process group and no memory for the model.
    """
    with _one_line_errors():
        from ringfx.cli.plan import Request, View, run
        from ringfx.cli.tables import rules_of, strategies_of

        request = Request(
            target=target,
            seq_len=seq_len,
            world_size=world_size,
            batch_size=batch_size,
            gpu_memory=gpu_memory,
            strategy=strategy or [],
            profile=profile,
            optimizer=optimizer,
            train=train,
            labels=labels,
            dtype=dtype,
            hf=hf,
            strict=strict,
            strategies=strategies_of(strategies),
            rules=rules_of(rules),
        )
        view = View(
            as_json=as_json,
            html=html,
            explain_layer=explain,
            what_if=what_if,
            sweep=sweep,
            max_seq_len=max_seq_len,
            diff=diff,
        )
        run(request, view)


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="MODULE:FACTORY, file.py:FACTORY, a Hugging Face config.json, or with --hf the"
            " name of a configuration class.",
        ),
    ],
    seq_len: Annotated[str, typer.Option(help="Tokens of one sequence: 4096, 128k, 1M.")] = "4k",
    batch_size: Annotated[
        int, typer.Option(help="Sequences in the batch.", min=1, max=MOST_ROWS)
    ] = 1,
    train: Annotated[
        bool,
        typer.Option("--train/--infer", help="Training mode, or eval mode without gradients."),
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="Floating type of the parameters, such as bfloat16.")
    ] = None,
    hf: Annotated[
        bool, typer.Option("--hf", help="MODEL is a transformers configuration class.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Fail if something looks like attention and was not recognised."
        ),
    ] = False,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="A table with operators of your own: ringfx.RULES | {...}.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
def calibrate(
    ranks: Annotated[
        int,
        typer.Option(
            help="Ranks to start on this machine (not under torchrun).", min=1, max=MOST_HERE
        ),
    ] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Take a tenth of the time, for a rough profile.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the profile.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Profile file; default: the folder where plans find it.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Also write every measurement, as JSON lines.")
    ] = None,
) -> None:
    """Measure this machine in a few minutes, and write a profile for predictions.

    Under torchrun every rank takes part, and the links between machines are measured.
    """
    with _one_line_errors():
        from ringfx.cli.calibrate import run

        run(ranks=ranks, device=device, quick=quick, name=name, out=out, records=records)


@app.command()
def bench(
    tokens: Annotated[str, typer.Option(help="Tokens of the whole sequence.")] = "4k",
    heads: Annotated[int, typer.Option(help="Query heads.", min=1, max=MOST_ROWS)] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Default: as many as heads.", min=1, max=MOST_ROWS)
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=MOST_ROWS)] = 64,
    batch: Annotated[int, typer.Option(min=1, max=MOST_ROWS)] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...")] = "float32",
    causal: Annotated[bool, typer.Option("--causal/--full")] = True,
    window: Annotated[
        int | None,
        typer.Option(help="Window: keys that a query sees.", min=1, max=2**40),
    ] = None,
    train: Annotated[bool, typer.Option("--train/--infer")] = True,
    ranks: Annotated[
        int, typer.Option(help="Ranks to start on this machine.", min=1, max=MOST_HERE)
    ] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    profile: Annotated[str | None, typer.Option(help="Profile to predict with.")] = None,
    rounds: Annotated[
        int, typer.Option(help="How often each strategy is run.", min=1, max=10**6)
    ] = 7,
) -> None:
    """Measure every strategy at one attention, and print the predictions beside it."""
    with _one_line_errors():
        from ringfx.cli.bench import Attention, run

        asked = Attention(
            tokens=tokens,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            causal=causal,
            window=window,
            train=train,
            device=device,
        )
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
