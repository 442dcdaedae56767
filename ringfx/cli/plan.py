"""``ringfx plan``: make or read a plan, then show it the way that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from ringfx import api
from ringfx.cli.model_target import Inputs, build, find_target, floating_dtype
from ringfx.compile.settings import Compiler
from ringfx.cost_model import (
    Profile,
    StrategyChoice,
    load_profile,
    parse_bytes,
    parse_tokens,
)
from ringfx.cost_model.choice.layers_again import Offload, Recompute
from ringfx.cost_model.choice.whatif import (
    Change,
    longest_sequence,
    parse_change,
    parse_sweep,
    replan,
    sweep,
    tokens,
)
from ringfx.errors import InvalidArgument, OutOfMemory
from ringfx.ir.note import Note
from ringfx.ir.plan import Plan
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.detect.count_attention import refuse_missed
from ringfx.report.plan_html import refused_html, to_html
from ringfx.report.plan_views import diff_text, strategy_options_text, sweep_text
from ringfx.strategies import STRATEGIES, Strategy
from ringfx.strategies.given import require_strategies
from ringfx.validation.json_reader import Source, parse_json
from ringfx.validation.text_files import check_writable, is_there, read_text, write_text
from ringfx.watch.stages import preparing, stage_done

__all__ = ["Request", "View", "number_or_name", "run", "strategy_choice"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is planned."""

    target: str
    seq_len: str | None
    world_size: int | None
    batch_size: int
    gpu_memory: str | None
    strategy: Sequence[str]
    profile: str | None
    optimizer: str
    train: bool
    labels: bool
    dtype: str | None
    hf: bool
    autocast: str | None = None
    strict: bool = False
    shard_states: bool | int = False
    param_dtype: str | None = None
    chunks: str = "auto"
    recompute: str = "auto"
    offload: str = "auto"
    head_groups: str = "auto"
    compiler: str = "inductor"
    token_dims: Sequence[str] = ()
    strategies: Mapping[str, Strategy] = field(default_factory=lambda: STRATEGIES)
    rules: AxisRules = field(default_factory=lambda: RULES)


@dataclass(frozen=True, kw_only=True)
class View:
    """Which views of the plan are printed; by default the plan itself."""

    as_json: bool = False
    html: Path | None = None
    explain_layer: str | None = None
    what_if: str | None = None
    sweep: str | None = None
    max_seq_len: bool = False
    diff: Path | None = None


def run(request: Request, view: View) -> None:
    """Print what was asked for.

    Raises
    ------
    RingfxError
        Whatever is wrong with the request, the model or the profile.
    """
    _check(request, view)
    if view == View(max_seq_len=True) and _saved(request) is None:
        print(_longest_text(request))  # the length that was given need not fit
        return
    try:
        plan = _planned(request, view)
    except OutOfMemory as error:
        _show_refused(error, request, view)
        raise
    _show(plan, request, view)


def _planned(request: Request, view: View) -> Plan:
    saved = _saved(request)
    if saved is None:
        return _made(request)
    return saved if request.gpu_memory is None or _asks(view) else _chosen_again(saved, request)


def _check(request: Request, view: View) -> None:
    """What can be refused before anything is planned."""
    if view.html is not None:
        check_writable(view.html)
    if view.diff is not None:
        _read(view.diff, request)
    if view.what_if is not None:
        parse_change(view.what_if)
    if view.sweep is not None:
        parse_sweep(view.sweep)


# --- making -----------------------------------------------------------------------------------


def _saved(request: Request) -> Plan | None:
    """The plan in the file that the target names, if it is a saved plan."""
    path = Path(request.target)
    if path.suffix != ".json" or not is_there(path) or not path.is_file():
        return None
    text = read_text(path)
    if not _is_plan(text, path):
        return None
    if request.seq_len is not None or request.world_size is not None:
        raise InvalidArgument(
            f"{path} is a saved plan: its length and number of ranks are fixed. Do: leave "
            "--seq-len and --world-size out, or use --what-if world-size=16,seq-len=1M."
        )
    if fixed := [name for name, is_given in _of_the_model(request).items() if is_given]:
        raise InvalidArgument(
            f"{path} is a saved plan, which {', '.join(fixed)} cannot change. Do: remove "
            f"{'it' if len(fixed) == 1 else 'them'}, or plan the model again."
        )
    plan = _read(path, request)
    if request.strict and plan.missed:
        refuse_missed(plan.missed)
    if request.gpu_memory is not None:
        plan = replace(plan, gpu_memory=parse_bytes(request.gpu_memory))
    return _chosen_again(plan, request) if request.profile or request.strategy else plan


def _read(path: Path, request: Request) -> Plan:
    """A saved plan whose strategies are all at hand."""
    plan = Plan.from_json(read_text(path), str(path))
    require_strategies(plan, request.strategies, f"{path}: this plan")
    return plan


def _is_plan(text: str, path: Path) -> bool:
    """Whether it says so, damaged or not; a Hugging Face configuration has a model type."""
    source = Source(
        where=str(path), damaged=str(path), error=InvalidArgument,
        remedy="give a plan that `ringfx plan --json` wrote, or a Hugging Face config.json",
    )  # fmt: skip
    fields = parse_json(text, source)
    if not isinstance(fields, dict) or "model_type" in fields:
        return False
    return "schema" in fields or {"layers", "world_size"} <= fields.keys()


def _of_the_model(request: Request) -> Mapping[str, bool]:
    """Options that say what is planned, and whether they were given."""
    return {
        "--batch-size": request.batch_size != 1,
        "--optimizer": request.optimizer != "none",
        "--infer": not request.train,
        "--dtype": request.dtype is not None,
        "--autocast": request.autocast is not None,
        "--rules": request.rules is not RULES,
        "--shard-states": request.shard_states is not False,
        "--param-dtype": request.param_dtype is not None,
        "--chunks": request.chunks != "auto",
        "--recompute": request.recompute != "auto",
        "--offload": request.offload != "auto",
        "--head-groups": request.head_groups != "auto",
        "--compiler": request.compiler != "inductor",
        "--token-dim": bool(request.token_dims),
    }


def _chosen_again(plan: Plan, request: Request) -> Plan:
    """A saved plan with the strategies that another profile, word or budget gives."""
    return replan(
        plan, Change(), _profile(plan, request), strategy_choice(request.strategy),
        request.strategies,
    )  # fmt: skip


def _asks(view: View) -> bool:
    """Whether a view that chooses again by itself, or that compares, is asked for."""
    return any((view.explain_layer, view.what_if, view.sweep, view.max_seq_len, view.diff))


def _made(request: Request) -> Plan:
    if request.world_size is None:
        raise InvalidArgument(
            f"planning {request.target} needs a number of ranks; only a saved plan has its own. "
            "Do: give --world-size 8, say, and --seq-len unless the model has inputs of its own."
        )
    inputs = Inputs(
        seq_len=None if request.seq_len is None else parse_tokens(request.seq_len),
        batch_size=request.batch_size,
        labels=request.labels and request.train,
    )
    budget = None if request.gpu_memory is None else parse_bytes(request.gpu_memory)
    chosen, autocast = strategy_choice(request.strategy), _autocast(request.autocast)
    with preparing(f"planning {request.target}", rank=0):
        factory = find_target(request.target, hf=request.hf, dtype=request.dtype)
        stage_done("imported")
        with api.offline():
            made = build(factory, inputs, request.target)
            made.model.train(request.train)
        stage_done("built")
        with torch.set_grad_enabled(request.train), autocast:
            plan = api.plan(
                made.model,
                made.args,
                dict(made.kwargs),
                world_size=request.world_size,
                gpu_memory=budget,
                profile=request.profile,
                strategy=chosen,
                optimizer=number_or_name(request.optimizer),
                strict=request.strict,
                shard_states=request.shard_states,
                mp_policy=_mp_policy(request.param_dtype),
                chunks=number_or_name(request.chunks),
                recompute=cast(Recompute, request.recompute),
                offload=cast(Offload, request.offload),
                head_groups=number_or_name(request.head_groups),
                compiler=cast(Compiler, request.compiler),
                token_dims=token_dims_of(request.token_dims),
                strategies=request.strategies,
                rules=request.rules,
            )
        stage_done("predicted")
    if not made.has_own_length or request.seq_len is None:
        return plan
    note = f"--seq-len was not used: {request.target} takes no seq_len and returns its own inputs"
    return replace(plan, notes=(*plan.notes, Note(text=note)))


def _autocast(dtype: str | None) -> AbstractContextManager[object]:
    """Autocast of the device that tensors without values count as."""
    if dtype is None:
        return nullcontext()
    if dtype not in ("bfloat16", "float16"):
        raise InvalidArgument(f"--autocast {dtype!r} is unknown. Do: use bfloat16 or float16.")
    return torch.autocast("cpu", getattr(torch, dtype))


def _mp_policy(param_dtype: str | None) -> Any:
    if param_dtype is None:
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=floating_dtype(param_dtype))


def number_or_name(word: str) -> Any:
    """An optimizer's name or bytes for each parameter; chunks by name or of so many tokens;
    groups of heads."""
    return int(word) if word.isdecimal() and len(word) <= 12 else word


def strategy_choice(words: Sequence[str]) -> str | Mapping[str, str]:
    """``NAME`` for the whole model, or ``GLOB=NAME`` rules in the order given.

    Raises
    ------
    InvalidArgument
        Several names without globs.
    """
    if not words:
        return "auto"
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    rules = [word.rpartition("=") for word in words]
    for word, (glob, _, name) in zip(words, rules, strict=True):
        if not glob or not name:
            raise InvalidArgument(
                f"--strategy {word!r} is not GLOB=NAME, which each of several must be. Do: give "
                'each like --strategy "model.layers.0.*=collective".'
            )
    return {glob: name for glob, _, name in rules}


def token_dims_of(words: Sequence[str]) -> Mapping[str, int]:
    """``INPUT=DIM`` words as a mapping.

    Raises
    ------
    InvalidArgument
        A word that is none.
    """
    found: dict[str, int] = {}
    for word in words:
        name, _, dim = word.rpartition("=")
        if not name or not dim.removeprefix("-").isdecimal() or len(dim) > 3:
            raise InvalidArgument(
                f"--token-dim {word!r} is no INPUT=DIM. Do: give it so, such as x=2."
            )
        found[name] = int(dim)
    return found


ROUNDS = 4
"""Plans at most, to find the longest sequence of a model."""

# --- showing ----------------------------------------------------------------------------------


def _show(plan: Plan, request: Request, view: View) -> None:
    """Views that stand alone, in the order of the help; the plan itself where none is asked for."""
    if view.html is not None:
        write_html(plan, view.html, request)
        if not view.as_json:
            print(f"written to {view.html}")
            return
        print(f"written to {view.html}", file=sys.stderr)  # the other stream is the plan's
    texts = _views(plan, request, view)
    for text in texts:
        print(text)
    if texts:
        return
    if view.as_json:
        print(plan.to_json())
        return
    console = Console()
    if console.is_terminal:
        console.print(plan)
    else:
        print(plan)


def _show_refused(error: OutOfMemory, request: Request, view: View) -> None:
    """The page of what does not fit, where a page was asked for; its text goes to stderr."""
    if view.html is None or error.shortfall is None:
        return
    asked = []
    if request.seq_len is not None:
        asked.append(f"{parse_tokens(request.seq_len):,} tokens")
    if request.world_size is not None:
        asked.append(f"{request.world_size:,} rank{'' if request.world_size == 1 else 's'}")
    write_text(view.html, refused_html(error, request.target, ", ".join(asked)))
    print(f"written to {view.html}", file=sys.stderr)


def _views(plan: Plan, request: Request, view: View) -> list[str]:
    texts = []
    chosen: StrategyChoice = strategy_choice(request.strategy)
    if view.explain_layer is not None:
        profile = _profile(plan, request)
        texts.append(strategy_options_text(plan, view.explain_layer, profile, request.strategies))
    if view.what_if is not None:
        change = parse_change(view.what_if)
        changed = replan(plan, change, _profile(plan, request), chosen, request.strategies)
        both = f"{changed}\n\n{diff_text(plan, changed)}"
        texts.append(changed.to_json() if view.as_json else both)
    if view.sweep is not None:
        name, changes = parse_sweep(view.sweep)
        results = sweep(plan, changes, _profile(plan, request), chosen, request.strategies)
        texts.append(sweep_text(name, changes, results))
        if name == "seq-len" and plan.gpu_memory is not None:
            texts.append(_longest_text(request))
    if view.max_seq_len:
        texts.append(_longest_text(request))
    if view.diff is not None:
        texts.append(diff_text(_read(view.diff, request), plan))
    return texts


def _longest_text(request: Request) -> str:
    """A saved plan has the chunks that it was made with; of a model all are tried."""
    plan = _saved(request)
    longest = _longest_of_a_model(request) if plan is None else _longest(plan, request)
    return f"longest sequence that fits: {longest:,} tokens"


def _longest_of_a_model(request: Request) -> int:
    """Planned again at each length that is found, until it is the length that was planned: a plan
    knows its own chunks only, which much fewer tokens would not need."""
    chunks = "all" if request.chunks == "auto" else request.chunks
    freely = replace(request, gpu_memory=None, chunks=chunks)
    budget = None if request.gpu_memory is None else parse_bytes(request.gpu_memory)
    longest = 0
    for _ in range(ROUNDS):
        plan = replace(_made(freely), gpu_memory=budget)
        at, longest = tokens(plan), _longest(plan, request)
        if request.seq_len is None:  # the model has inputs of its own
            break
        if abs(longest - at) <= at // 500:
            return min(longest, at)
        freely = replace(freely, seq_len=str(max(longest, at // 8, 1)))
    return longest


def _longest(plan: Plan, request: Request) -> int:
    return longest_sequence(
        plan, _profile(plan, request), strategy_choice(request.strategy),
        strategies=request.strategies,
    )  # fmt: skip


def write_html(plan: Plan, path: Path, request: Request) -> None:
    """The page of a plan, with the same model from an eighth to eight times as long and split."""
    given = _profile(plan, request), strategy_choice(request.strategy), request.strategies
    lengths, ranks = _around(tokens(plan)), _around(plan.world_size)
    with preparing(f"the page of {request.target}", rank=0):
        by_length = sweep(plan, [Change(seq_len=n) for n in lengths], *given)
        stage_done("other lengths")
        by_ranks = sweep(plan, [Change(world_size=n) for n in ranks], *given)
        stage_done("other numbers of ranks")
        curves = list(zip(lengths, by_length, strict=True)), list(zip(ranks, by_ranks, strict=True))
        write_text(path, to_html(plan, *curves, name=request.target))


def _around(number: int) -> list[int]:
    """From an eighth to eight times, by twos."""
    return list(dict.fromkeys(max(1, round(number * 2.0**i)) for i in range(-3, 4)))


def _profile(plan: Plan, request: Request) -> Profile:
    """The profile that made the plan: by the name given, else by the plan's."""
    return load_profile(request.profile or plan.profile, device=plan.device)
