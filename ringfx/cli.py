"""The command ``ringfx``: see what would happen to a model, before any device is rented."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ringfx.errors import InvalidArgument, RingfxError

if TYPE_CHECKING:
    from ringfx.plan import Plan

__all__ = ["app", "main"]

USER_MISTAKE = 2
"""Exit code of everything that the user can put right."""

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
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="MODULE:FACTORY, file.py:FACTORY, a Hugging Face config.json, or with --hf the"
            " name of a configuration class.",
        ),
    ],
    seq_len: Annotated[str, typer.Option(help="Tokens of one sequence: 4096, 128k, 1M.")],
    world_size: Annotated[int, typer.Option(help="Ranks over which the sequence is split.", min=1)],
    batch_size: Annotated[int, typer.Option(help="Sequences in the batch.", min=1)] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(help='Memory of one rank, such as "80GiB"; default: no limit.')
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help='A strategy\'s name, or "GLOB=NAME" (may be repeated); default: auto.'),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile name or file; default: the one of this device.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--infer", help="With a backward pass, or forward only.")
    ] = True,
    labels: Annotated[
        bool, typer.Option(help="Pass labels where forward takes them (when training).")
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="Floating type of the parameters, such as bfloat16.")
    ] = None,
    hf: Annotated[
        bool, typer.Option("--hf", help="TARGET is a transformers configuration class.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print which strategy each attention layer gets, what it costs, and why.

    Runs on fake tensors: no device, no process group and no memory for the model are needed.
    """
    with _one_line_errors():
        made = _plan(
            target,
            seq_len=seq_len,
            world_size=world_size,
            batch_size=batch_size,
            gpu_memory=gpu_memory,
            strategy=strategy or [],
            profile=profile,
            train=train,
            labels=labels,
            dtype=dtype,
            hf=hf,
        )
        _show(made, as_json)


@app.command()
def calibrate(
    ranks: Annotated[
        int, typer.Option(help="Ranks to start on this machine (not under torchrun).", min=1)
    ] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the time: a rough profile.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the profile.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Profile file; default: where plans look for it.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Also write every measurement, as JSON lines.")
    ] = None,
) -> None:
    """Measure this machine in a few minutes, and write the profile that plans predict with.

    Under torchrun every rank takes part, and the links between the machines are measured.
    """
    with _one_line_errors():
        from ringfx.calibrate_command import run

        run(ranks=ranks, device=device, quick=quick, name=name, out=out, records=records)


def main() -> None:
    """Entry point of the console script."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A mistake of the user gives its text and exit code 2, never a traceback."""
    try:
        yield
    except RingfxError as error:
        print(f"ringfx: {error}", file=sys.stderr)
        raise typer.Exit(USER_MISTAKE) from error


def _plan(
    target: str,
    *,
    seq_len: str,
    world_size: int,
    batch_size: int,
    gpu_memory: str | None,
    strategy: Sequence[str],
    profile: str | None,
    train: bool,
    labels: bool,
    dtype: str | None,
    hf: bool,
) -> Plan:
    status = Console(stderr=True).status("importing torch")
    with status:
        import torch

        from ringfx import api
        from ringfx.cost_model import parse_bytes, parse_tokens
        from ringfx.target import Inputs, build, find_target

        inputs = Inputs(
            seq_len=parse_tokens(seq_len), batch_size=batch_size, labels=labels and train
        )
        budget = None if gpu_memory is None else parse_bytes(gpu_memory)
        chosen = _strategy(strategy)
        status.update(f"importing {target}")
        factory = find_target(target, hf=hf, dtype=dtype)
        status.update(f"building {target} on fake tensors")
        with api.offline():
            made = build(factory, inputs, target)
            made.model.train(train)
        status.update(f"planning {inputs.seq_len:,} tokens over {world_size} ranks")
        with torch.set_grad_enabled(train):
            return api.plan(
                made.model,
                made.args,
                dict(made.kwargs),
                world_size=world_size,
                gpu_memory=budget,
                profile=profile,
                strategy=chosen,
            )


def _strategy(words: Sequence[str]) -> str | Mapping[str, str]:
    """``NAME`` for the whole model, or ``GLOB=NAME`` rules in the order given."""
    if not words:
        return "auto"
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    rules = [word.rpartition("=") for word in words]
    for word, (glob, _, name) in zip(words, rules, strict=True):
        if not glob or not name:
            raise InvalidArgument(
                f"--strategy {word!r}: several rules need the form GLOB=NAME,"
                ' such as "model.layers.0.*=collective".'
            )
    return {glob: name for glob, _, name in rules}


def _show(made: Plan, as_json: bool) -> None:
    if as_json:
        print(made.to_json())
        return
    console = Console()
    if console.is_terminal:
        console.print(made)
    else:
        print(made)


if __name__ == "__main__":
    main()
