"""The options of the commands, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "AsJson",
    "Autocast",
    "Batch",
    "Causal",
    "Chunks",
    "Compiler",
    "Device",
    "Diff",
    "Dtype",
    "Explain",
    "GpuMemory",
    "HeadDim",
    "Heads",
    "HeadsOfKV",
    "Html",
    "HuggingFace",
    "Labels",
    "MaxSeqLen",
    "Name",
    "Narrow",
    "Optimizer",
    "Out",
    "Profile",
    "Quick",
    "Ranks",
    "RanksHere",
    "Records",
    "Reduce",
    "Rounds",
    "Rules",
    "SeqLen",
    "Sequences",
    "ShardStates",
    "Strategies",
    "Strategy",
    "Strict",
    "Sweep",
    "Target",
    "Tokens",
    "Train",
    "WhatIf",
    "Window",
    "WorldSize",
]  # fmt: skip

MOST_ROWS, MOST_HERE = 2**16, 1024
"""Sequences in a batch, heads and their length; ranks that are started on one machine."""


def _model(*names: str, **given: Any) -> Any:
    return typer.Option(*names, rich_help_panel="The model", **given)


def _plan(*names: str, **given: Any) -> Any:
    return typer.Option(*names, rich_help_panel="The plan", **given)


def _output(*names: str, **given: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Output (default: the plan)", **given)


# --- the model -----------------------------------------------------------------------------------

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="MODULE:FACTORY, file.py:FACTORY, a Hugging Face config.json, with --hf the name of a"
        " configuration class, or (plan only) a plan saved with --json.",
    ),
]
SeqLen = Annotated[
    str | None,
    _model(
        help="Tokens of one sequence: 4096, 128k, 1M. Default: what the factory makes by itself;"
        " explain takes 4k where that needs a length, verify 250."
    ),
]
Sequences = Annotated[int, _model(help="Sequences in the batch.", min=1, max=MOST_ROWS)]
Train = Annotated[
    bool, _model("--train/--infer", help="Forward and backward, or forward only in eval mode.")
]
Labels = Annotated[bool, _model(help="Pass labels if forward accepts them (when training).")]
Dtype = Annotated[str | None, _model(help="Floating type of the parameters, such as bfloat16.")]
Autocast = Annotated[
    str | None, _model(help="Plan under torch.autocast in this type: bfloat16 or float16.")
]
HuggingFace = Annotated[bool, _model("--hf", help="TARGET is a transformers configuration class.")]
Strict = Annotated[
    bool,
    _model("--strict", help="Fail if something looks like attention and was not recognised."),
]
Rules = Annotated[
    str | None,
    _model(metavar="MODULE:NAME", help="A table with operators of your own: ringfx.RULES | {...}."),
]

# --- the plan ------------------------------------------------------------------------------------

WorldSize = Annotated[
    int | None, _plan(help="Ranks over which the sequence is split.", min=1, max=2**30)
]
GpuMemory = Annotated[
    str | None, _plan(help='Memory of one rank, such as "80GiB"; default: no limit.')
]
Strategy = Annotated[
    list[str] | None,
    _plan(
        help="simple (reference ring), collective (all-gather of K/V), production (overlapped "
        'ring) or ulysses (all-to-all of heads); or "GLOB=NAME" (may be repeated). Default: auto.'
    ),
]
Strategies = Annotated[
    str | None,
    _plan(
        metavar="MODULE:NAME",
        help="A table with strategies of your own: ringfx.STRATEGIES | {...}.",
    ),
]
Profile = Annotated[
    str | None, _plan(help="Profile name or file; default: the one of this device.")
]
Optimizer = Annotated[
    str,
    _plan(
        help="Optimizer whose state is counted: adamw, momentum, sgd, ..., or its bytes for each "
        "parameter."
    ),
]

ShardStates = Annotated[
    bool,
    _plan(
        "--shard-states",
        help="Each rank holds its rows of parameters, gradients and optimizer state.",
    ),
]
StateRanks = Annotated[
    int | None,
    _plan(
        min=1,
        max=2**30,
        help="Ranks that share these states, if more than the sequence's: times data parallel.",
    ),
]
ParamDtype = Annotated[
    str | None,
    _plan(
        help="Sharded parameters are gathered and used in it, such as bfloat16; their rows stay."
    ),
]
Chunks = Annotated[
    str,
    _plan(
        help="Wide parts that run in chunks of tokens: auto (losses; more if memory is short), "
        "all, none, or the tokens of a chunk."
    ),
]

Recompute = Annotated[
    str,
    _plan(
        help="Layers that backward computes again instead of keeping them: auto (as many as "
        "--gpu-memory demands), layers (all, their attention apart), attention (it too), none."
    ),
]
Offload = Annotated[
    str,
    _plan(
        help="What layers that are computed again still keep waits in the host's memory: auto (as "
        "much as --gpu-memory demands), all, none."
    ),
]
HeadGroups = Annotated[
    str,
    _plan(
        help="Groups of heads that attention works through one after the other: auto (more if "
        "memory is short), or a number from 1 to 8."
    ),
]

TokenDims = Annotated[
    list[str] | None,
    _plan(
        "--token-dim",
        metavar="INPUT=DIM",
        help="Of a model without attention: the dimension of an input that holds the tokens, such "
        "as x=2. Default: found. Repeatable.",
    ),
]

# --- what is shown -------------------------------------------------------------------------------

AsJson = Annotated[bool, _output("--json", help="Print JSON, to save it.")]
Html = Annotated[Path | None, _output(help="Write one page with charts to this file.")]
Explain = Annotated[
    str | None,
    _output(metavar="LAYER", help="Compare all strategies for the layers that match this glob."),
]
WhatIf = Annotated[
    str | None, _output(help="Plan again with changes: world-size=16,link=50GB/s,seq-len=1M.")
]
Sweep = Annotated[
    str | None,
    _output(help="Plan for a range of values: seq-len=8k..1M, or world-size=2,4,8."),
]
MaxSeqLen = Annotated[
    bool, _output("--max-seq-len", help="Find the longest sequence that fits --gpu-memory.")
]
Diff = Annotated[Path | None, _output(help="Show the differences from this saved plan.")]

# --- comparing -----------------------------------------------------------------------------------

RanksHere = Annotated[int, _plan("--world-size", help="Ranks to start here.", min=2, max=64)]
Reduce = Annotated[
    bool,
    _model(
        "--reduce",
        help="Compare a small model of the same code: a layer of each kind, 250 tokens, narrower "
        "if it is large.",
    ),
]
Compiler = Annotated[
    str, _plan(help="aot_eager or eager (what ringfx rewrites), or inductor (its programs too).")
]
PlannedCompiler = Annotated[
    str,
    _plan(
        help="What compiles the split program, as ringfx.optimize is told: inductor (fuses "
        "operators), aot_eager, eager."
    ),
]
Narrow = Annotated[
    str | None, _plan(help="A type whose distance from float64 is reported too; none: of none.")
]

# --- measuring -----------------------------------------------------------------------------------

Ranks = Annotated[
    int,
    typer.Option(help="Ranks to start on this machine (not under torchrun).", min=1, max=MOST_HERE),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Take a tenth of the time, for a rough profile.")
]
Name = Annotated[str | None, typer.Option(help="Name of the profile.")]
Out = Annotated[
    Path | None, typer.Option(help="Profile file; default: the folder where plans find it.")
]
Records = Annotated[Path | None, typer.Option(help="Also write every measurement, as JSON lines.")]
Tokens = Annotated[str, typer.Option(help="Tokens of the whole sequence.")]
Heads = Annotated[int, typer.Option(help="Query heads.", min=1, max=MOST_ROWS)]
HeadsOfKV = Annotated[
    int | None, typer.Option(help="Default: as many as heads.", min=1, max=MOST_ROWS)
]
HeadDim = Annotated[int, typer.Option(help="Width of a head.", min=1, max=MOST_ROWS)]
Batch = Annotated[int, typer.Option(help="Sequences in the batch.", min=1, max=MOST_ROWS)]
Causal = Annotated[bool, typer.Option("--causal/--full")]
Window = Annotated[
    int | None, typer.Option(help="Window: keys that a query sees.", min=1, max=2**40)
]
Rounds = Annotated[int, typer.Option(help="How often each strategy is run.", min=1, max=10**6)]
