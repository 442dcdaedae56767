"""``ringfx plan``: make or read a plan, then show it the way that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from ringfx import api
from ringfx.cli.model_target import Inputs, build, find_target, floating_dtype
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
from ringfx.errors import InvalidArgument
from ringfx.ir.note import Note
from ringfx.ir.plan import Plan
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.detect.count_attention import refuse_missed
from ringfx.report.plan_html import to_html
from ringfx.report.plan_views import diff_text, strategy_options_text, sweep_text
from ringfx.strategies import STRATEGIES, Strategy
from ringfx.strategies.given import require_strategies
from ringfx.validation.json_reader import Source, parse_json
from ringfx.validation.text_files import check_writable, is_there, read_text, write_text

__all__ = ["Request", "View", "run"]


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
    strict: bool = False
    shard_states: bool | int = False
    param_dtype: str | None = None
    chunks: str = "auto"
    recompute: str = "auto"
    offload: str = "auto"
    head_groups: str = "auto"
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
    saved = _saved(request)
    if saved is None:
        _show(_made(request), request, view)
    elif request.gpu_memory is None or _asks(view):
        _show(saved, request, view)
    else:
        _show(_chosen_again(saved, request), request, view)


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
    source = Source(where=str(path), damaged=str(path), error=InvalidArgument)
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
        "--rules": request.rules is not RULES,
        "--shard-states": request.shard_states is not False,
        "--param-dtype": request.param_dtype is not None,
        "--chunks": request.chunks != "auto",
        "--recompute": request.recompute != "auto",
        "--offload": request.offload != "auto",
        "--head-groups": request.head_groups != "auto",
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
    if request.seq_len is None or request.world_size is None:
        raise InvalidArgument(
            f"planning {request.target} needs --seq-len and --world-size; only a saved plan needs "
            "neither."
        )
    inputs = Inputs(
        seq_len=parse_tokens(request.seq_len),
        batch_size=request.batch_size,
        labels=request.labels and request.train,
    )
    budget = None if request.gpu_memory is None else parse_bytes(request.gpu_memory)
    chosen = strategy_choice(request.strategy)
    with Console(stderr=True).status(f"importing {request.target}") as status:
        factory = find_target(request.target, hf=request.hf, dtype=request.dtype)
        status.update(f"building {request.target} on fake tensors")
        with api.offline():
            made = build(factory, inputs, request.target)
            made.model.train(request.train)
        status.update(f"planning {inputs.seq_len:,} tokens over {request.world_size} ranks")
        with torch.set_grad_enabled(request.train):
            plan = api.plan(
                made.model,
                made.args,
                dict(made.kwargs),
                world_size=request.world_size,
                gpu_memory=budget,
                profile=request.profile,
                strategy=chosen,
                optimizer=_number_or_name(request.optimizer),
                strict=request.strict,
                shard_states=request.shard_states,
                mp_policy=_mp_policy(request.param_dtype),
                chunks=_number_or_name(request.chunks),
                recompute=cast(Recompute, request.recompute),
                offload=cast(Offload, request.offload),
                head_groups=_number_or_name(request.head_groups),
                strategies=request.strategies,
                rules=request.rules,
            )
    if not made.has_own_length:
        return plan
    note = f"--seq-len was not used: {request.target} takes no seq_len and returns its own inputs"
    return replace(plan, notes=(*plan.notes, Note(text=note)))


def _mp_policy(param_dtype: str | None) -> Any:
    if param_dtype is None:
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=floating_dtype(param_dtype))


def _number_or_name(word: str) -> Any:
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
                f"--strategy {word!r}: several rules need the form GLOB=NAME,"
                ' such as "model.layers.0.*=collective".'
            )
    return {glob: name for glob, _, name in rules}


# --- showing ----------------------------------------------------------------------------------


def _show(plan: Plan, request: Request, view: View) -> None:
    """Views that stand alone, in the order of the help; the plan itself where none is asked for."""
    if view.html is not None:
        write_html(plan, view.html, request)
        print(f"written to {view.html}")
        return
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
            texts.append(_longest_text(plan, request, chosen))
    if view.max_seq_len:
        texts.append(_longest_text(plan, request, chosen))
    if view.diff is not None:
        texts.append(diff_text(_read(view.diff, request), plan))
    return texts


def _longest_text(plan: Plan, request: Request, chosen: StrategyChoice) -> str:
    longest = longest_sequence(plan, _profile(plan, request), chosen, strategies=request.strategies)
    return f"longest sequence that fits: {longest:,} tokens"


def write_html(plan: Plan, path: Path, request: Request) -> None:
    """The page of a plan, with the same model from an eighth to eight times as long and split."""
    given = _profile(plan, request), strategy_choice(request.strategy), request.strategies
    lengths, ranks = _around(tokens(plan)), _around(plan.world_size)
    by_length = sweep(plan, [Change(seq_len=n) for n in lengths], *given)
    by_ranks = sweep(plan, [Change(world_size=n) for n in ranks], *given)
    curves = list(zip(lengths, by_length, strict=True)), list(zip(ranks, by_ranks, strict=True))
    write_text(path, to_html(plan, *curves))


def _around(number: int) -> list[int]:
    """From an eighth to eight times, by twos."""
    return list(dict.fromkeys(max(1, round(number * 2.0**i)) for i in range(-3, 4)))


def _profile(plan: Plan, request: Request) -> Profile:
    """The profile that made the plan: by the name given, else by the plan's."""
    return load_profile(request.profile or plan.profile, device=plan.device)
