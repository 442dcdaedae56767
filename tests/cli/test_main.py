"""The command line up to the planner: what it builds, what it passes on, how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from typer.testing import CliRunner, Result

from ringfx.cli.main import app
from ringfx.cost_model import choose
from ringfx.errors import AttentionNotFound
from ringfx.ir.plan import Plan
from tests.cost_model.sites import causal_site, shipped

IS_THERE = "Do: name one that is there; a relative path starts where the command runs."

FACTORIES = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(16, width)
    def forward(self, input_ids, labels=None):
        return self.embed(input_ids)

class Dense(nn.Module):
    def forward(self, x, y):
        return x + y

def make(): return Tiny()
def sized(seq_len, batch_size): return Dense(), (torch.zeros(batch_size, seq_len, 4),), {"y": 1}
def pair(): return Tiny(), (torch.zeros(1, 5, dtype=torch.int64),)
def dense(): return Dense()
def few(): return Dense(), (torch.zeros(1),)
def nothing(): return None
def odd(): return Tiny(), "inputs"
def broken(): return Tiny(width="wide")
number = 3
"""


@dataclass
class Planner:
    """Stands for ``ringfx.api``: records what it is asked, and plans one known layer."""

    asked: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None

    @contextmanager
    def offline(self) -> Iterator[None]:
        with FakeTensorMode():
            yield

    def plan(self, model: nn.Module, args: Any, kwargs: Any, **options: Any) -> Plan:
        grad = torch.is_grad_enabled()
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.asked = {"model": model, "args": args, "kwargs": kwargs, "grad": grad, **options}
        self.asked["autocast"] = autocast
        if self.error is not None:
            raise self.error
        profile = shipped("h100-sxm-published")
        return Plan(
            world_size=options["world_size"],
            gpu_memory=options["gpu_memory"],
            device="cuda",
            profile=profile.name,
            profile_origin=profile.origin,
            layers=choose([causal_site()], world_size=8, profile=profile),
        )


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Planner:
    planner = Planner()
    monkeypatch.setattr("ringfx.api.offline", planner.offline)
    monkeypatch.setattr("ringfx.api.plan", planner.plan)
    return planner


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module ``factories``, made the current one."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


def _run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words, "--seq-len", "64", "--world-size", "8"])


def _fails(*words: str) -> str:
    """The one text that a mistake gives on stderr; no traceback, exit code 2."""
    result = _run(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr.strip()


# --- what is passed on -------------------------------------------------------------------------


def test_a_factory_gets_token_ids_and_labels_as_fake_tensors(
    planner: Planner, factories: Path
) -> None:
    result = _run("factories:make", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    assert {n: tuple(t.shape) for n, t in planner.asked["kwargs"].items()} == {
        "input_ids": (2, 64),
        "labels": (2, 64),
    }
    assert planner.asked["kwargs"]["input_ids"].dtype == torch.int64
    assert isinstance(planner.asked["kwargs"]["input_ids"], FakeTensor)
    assert isinstance(planner.asked["model"].embed.weight, FakeTensor)
    assert planner.asked["model"].training
    assert planner.asked["grad"]
    assert "model.layers.0.self_attn" in result.stdout


def test_inference_has_no_labels_no_gradient_and_eval_mode(
    planner: Planner, factories: Path
) -> None:
    assert _run("factories:make", "--infer").exit_code == 0
    assert list(planner.asked["kwargs"]) == ["input_ids"]
    assert not planner.asked["grad"]
    assert not planner.asked["model"].training


def test_labels_can_be_left_out_of_training(planner: Planner, factories: Path) -> None:
    assert _run("factories:make", "--no-labels").exit_code == 0
    assert list(planner.asked["kwargs"]) == ["input_ids"]


def test_a_factory_may_give_inputs_and_take_sizes(planner: Planner, factories: Path) -> None:
    assert _run("factories:sized", "--batch-size", "3").exit_code == 0
    assert planner.asked["args"][0].shape == (3, 64, 4)
    assert planner.asked["kwargs"] == {"y": 1}
    assert _run("factories:pair").exit_code == 0
    assert planner.asked["args"][0].shape == (1, 5)


def test_a_file_is_a_module_too(planner: Planner, factories: Path) -> None:
    assert _run(str(factories / "factories.py") + ":make").exit_code == 0


def test_options_reach_the_planner(planner: Planner, factories: Path) -> None:
    words = ["--gpu-memory", "80GiB", "--profile", "h100-sxm-published", "--strategy", "simple"]
    assert _run("factories:make", *words).exit_code == 0
    asked = {k: planner.asked[k] for k in ("world_size", "gpu_memory", "profile", "strategy")}
    assert asked == {
        "world_size": 8,
        "gpu_memory": 80 * 2**30,
        "profile": "h100-sxm-published",
        "strategy": "simple",
    }
    assert _run("factories:make").exit_code == 0
    assert planner.asked["strategy"] == "auto"
    assert planner.asked["gpu_memory"] is None


def test_rules_for_globs_keep_their_order(planner: Planner, factories: Path) -> None:
    _run("factories:make", "--strategy", "*=collective", "--strategy", "*.0.*=ulysses")
    assert list(planner.asked["strategy"].items()) == [("*", "collective"), ("*.0.*", "ulysses")]


def test_dimensions_of_tokens_reach_the_planner(planner: Planner, factories: Path) -> None:
    _run("factories:make", "--token-dim", "x=2", "--token-dim", "batch.y=-1")
    assert planner.asked["token_dims"] == {"x": 2, "batch.y": -1}


def test_dtype_converts_the_parameters(planner: Planner, factories: Path) -> None:
    assert _run("factories:make", "--dtype", "bfloat16").exit_code == 0
    assert planner.asked["model"].embed.weight.dtype == torch.bfloat16


def test_a_plan_is_made_under_autocast(planner: Planner, factories: Path) -> None:
    for words, dtype in (([], None), (["--autocast", "float16"], torch.float16)):
        assert _run("factories:make", *words).exit_code == 0
        assert planner.asked["autocast"] is dtype
        assert planner.asked["model"].embed.weight.dtype == torch.float32


def test_json_is_the_plan_itself(planner: Planner, factories: Path) -> None:
    result = _run("factories:make", "--json")
    assert Plan.from_json(result.stdout).world_size == 8


def test_sequence_lengths_are_read_as_they_are_spoken(planner: Planner, factories: Path) -> None:
    result = CliRunner().invoke(
        app, ["plan", "factories:make", "--seq-len", "1M", "--world-size", "8"]
    )
    assert result.exit_code == 0
    assert planner.asked["kwargs"]["input_ids"].shape == (1, 2**20)


def test_inputs_of_the_factory_need_no_length(planner: Planner, factories: Path) -> None:
    words = ["plan", "factories:pair", "--world-size", "8"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "--seq-len was not used" not in result.stdout
    assert planner.asked["args"][0].shape == (1, 5)
    for factory, text in (("make", "has no inputs of its own"), ("sized", "takes seq_len")):
        refused = CliRunner().invoke(app, ["plan", f"factories:{factory}", "--world-size", "8"])
        assert refused.exit_code == 2
        assert f"factories:{factory} {text}. Do: give --seq-len" in refused.stderr


# --- Hugging Face --------------------------------------------------------------------------------


def _small_llama() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **sizes,
        **heads,
    }


def test_a_hugging_face_config_file_or_its_folder_makes_its_model(
    planner: Planner, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_small_llama()))
    for target in (tmp_path / "config.json", tmp_path):
        assert _run(str(target)).exit_code == 0
        assert type(planner.asked["model"]).__name__ == "LlamaForCausalLM"
        assert len(planner.asked["model"].model.layers) == 2
        assert set(planner.asked["kwargs"]) == {"input_ids", "labels"}


def test_a_hugging_face_configuration_class_makes_its_causal_model(planner: Planner) -> None:
    result = _run("GPT2Config", "--hf", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert type(planner.asked["model"]).__name__ == "GPT2LMHeadModel"
    assert planner.asked["model"].dtype == torch.bfloat16


def test_a_factory_may_give_a_hugging_face_config(planner: Planner, factories: Path) -> None:
    (factories / "given.py").write_text(
        "from transformers import LlamaConfig\n"
        f"def config(): return LlamaConfig(**{_small_llama()})\n"
    )
    assert _run("given:config").exit_code == 0
    assert type(planner.asked["model"]).__name__ == "LlamaForCausalLM"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["factories"],
            "ringfx: 'factories' names no factory. Do: give MODULE:FACTORY, such as mymodel:make,"
            " a config.json, or --hf with a configuration class.",
        ),
        (
            ["factories:maek"],
            "ringfx: module 'factories' has no attribute 'maek'. Did you mean 'make'?"
            " Do: name a function that makes the model.",
        ),
        (
            ["factories:number"],
            "ringfx: factories:number is a int, not a function that makes the model. Do: name a"
            " function, a class or a module, such as mymodel:make.",
        ),
        (
            ["factories:nothing"],
            "ringfx: factories:nothing gave None. Do: return a torch.nn.Module, a tuple"
            " (model, args) or (model, args, kwargs), or a Hugging Face configuration.",
        ),
        (
            ["factories:odd"],
            "ringfx: factories:odd gave a tuple of Tiny, str. Do: return a torch.nn.Module,"
            " a tuple (model, args) or (model, args, kwargs), or a Hugging Face configuration.",
        ),
        (
            ["factories:few"],
            "ringfx: factories:few: its inputs do not fit Dense.forward:"
            " missing a required argument: 'y'. Do: return inputs that model(*args, **kwargs)"
            " takes: forward(x, y).",
        ),
        (
            ["factories:dense"],
            "ringfx: factories:dense: ringfx can generate input_ids and labels only, not the inputs"
            " of Dense.forward(x, y). Do: let the factory return (model, args, kwargs);"
            " it may take seq_len and batch_size.",
        ),
        (
            ["factories:make", "--strategy", "simple", "--strategy", "*=ulysses"],
            "ringfx: --strategy 'simple' is not GLOB=NAME, which each of several must be. Do: give"
            ' each like --strategy "model.layers.0.*=collective".',
        ),
        (
            ["factories:make", "--gpu-memory", "lots"],
            "ringfx: 'lots' is not a memory size. Do: give bytes as an integer, or a text such as"
            ' "80GiB", "512 MiB" or "80GB".',
        ),
        (
            ["factories:make", "--dtype", "int8"],
            "ringfx: 'int8' is not a floating dtype. Do: give float32, bfloat16, float16 or"
            " float64.",
        ),
        (
            ["factories:make", "--autocast", "int8"],
            "ringfx: --autocast 'int8' is unknown. Do: use bfloat16 or float16.",
        ),
        (["absent.py:make"], f"ringfx: there is no file absent.py. {IS_THERE}"),
        (["absent.json"], f"ringfx: there is no file absent.json. {IS_THERE}"),
        (
            ["LammaConfig", "--hf"],
            "ringfx: transformers has no configuration class 'LammaConfig'."
            " Did you mean 'LlamaConfig'? Do: name one such as LlamaConfig, or give a config.json.",
        ),
    ],
)
def test_a_mistake_gives_one_clear_line_and_exit_code_2(
    planner: Planner, factories: Path, words: list[str], message: str
) -> None:
    assert _fails(*words) == message


def test_a_missing_module_says_where_it_looked(planner: Planner, factories: Path) -> None:
    assert _fails("absent:make") == (
        f"ringfx: there is no module 'absent' (looked in {Path.cwd()} and the Python path)."
        " Do: run from the folder that holds it, or give path/to/file.py:FACTORY."
    )


def test_a_module_that_imports_something_missing_names_that(
    planner: Planner, factories: Path
) -> None:
    (factories / "needy.py").write_text("import not_installed_anywhere\n")
    assert _fails("needy:make") == (
        "ringfx: importing needy needs the module 'not_installed_anywhere', which is not installed."
        " Do: install what holds it, or run from the folder that does."
    )


def test_an_error_in_the_users_code_names_its_line(planner: Planner, factories: Path) -> None:
    (factories / "wrong.py").write_text("x = 1\ny = x / 0\n")
    assert _fails("wrong:make") == (
        "ringfx: importing wrong failed with ZeroDivisionError: division by zero"
        f" ({factories / 'wrong.py'}:2). Do: mend it there; a plan builds models on the meta"
        " device, without values."
    )
    assert _fails("factories:broken").startswith("ringfx: factories:broken failed with TypeError:")


def test_an_error_that_hides_another_names_it_too(planner: Planner, factories: Path) -> None:
    (factories / "hides.py").write_text(
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('no x') from e\n"
    )
    assert "RuntimeError: no x, caused by ZeroDivisionError: division by zero" in _fails("hides:x")


def test_code_that_ends_or_is_no_python_names_its_line(planner: Planner, factories: Path) -> None:
    (factories / "ends.py").write_text("import sys\nsys.exit(3)\n")
    (factories / "typo.py").write_text("x = 1\ndef make(:\n")
    assert f"failed with SystemExit: 3 ({factories / 'ends.py'}:2)" in _fails("ends:make")
    assert f"({factories / 'typo.py'}:2)" in _fails("typo:make")


def test_a_config_file_that_is_none_says_why(planner: Planner, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{")
    assert _fails(str(file)).startswith(f"ringfx: {file}: line 1 is not JSON (")
    file.write_text("{}")
    assert _fails(str(file)) == (
        f'ringfx: {file} is not a Hugging Face configuration: it has no "model_type".'
        " Do: give the config.json of a transformers model, or a factory, MODULE:FACTORY."
    )


def test_without_transformers_the_remedy_is_named(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert _fails("LlamaConfig", "--hf") == (
        "ringfx: this needs transformers, which is not installed."
        " Do: pip install transformers, or give MODULE:FACTORY."
    )


def test_an_error_of_the_planner_is_one_text(planner: Planner, factories: Path) -> None:
    planner.error = AttentionNotFound("no attention found in Tiny.")
    assert _fails("factories:make") == "ringfx: no attention found in Tiny."


def test_a_defect_of_ringfx_is_not_dressed_as_a_mistake(planner: Planner, factories: Path) -> None:
    planner.error = AssertionError("broken invariant")
    result = _run("factories:make")
    assert result.exit_code == 1
    assert isinstance(result.exception, AssertionError)


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "plan" in result.stdout
