"""The demo must agree with a right run and refuse a wrong one."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.agreement import disagreements, largest_gradient_difference, loss_difference
from examples.peak_memory import extra_bytes
from examples.runs import Run, RunError, Setting, execute

ROOT = Path(__file__).parent.parent
MIB = 2**20
SMALL = ("--steps", "2", "--seq-len", "131", "--compiler", "eager")

Gradients = dict[str, torch.Tensor | None]


def a_run(ranks: int = 1) -> Run:
    """A run whose key bias has a gradient that is zero in theory and noise in practice."""
    gradients: Gradients = {"weight": torch.tensor([1.0, -2.0]), "key.bias": torch.tensor([1e-9])}
    return Run(
        setting=Setting(name="a run", ranks=ranks, threads=1),
        losses=((4.0, 2.0),) * ranks,
        seconds=(9.0, 1.0),
        extra_bytes=(MIB,) * ranks,
        gradients=(gradients,) * ranks,
        plan="",
    )


def with_gradient(name: str, value: torch.Tensor | None) -> Run:
    right: Gradients = a_run().gradients[0]
    return dataclasses.replace(a_run(2), gradients=(right, {**right, name: value}))


def test_a_run_agrees_with_itself() -> None:
    assert disagreements(a_run(), a_run(2)) == []


@pytest.mark.parametrize(
    ("losses", "step"),
    [((4.0 * (1 + 2e-6), 2.0), 0), ((4.0, 2.0 * (1 + 2e-3)), 1), ((math.nan, 2.0), 0)],
)
def test_a_wrong_loss_on_the_second_rank_disagrees(losses: tuple[float, float], step: int) -> None:
    run = dataclasses.replace(a_run(2), losses=((4.0, 2.0), losses))
    assert [text.split(" by ")[0] for text in disagreements(a_run(), run)] == [
        f"a run: loss of step {step}"
    ]


def test_later_losses_may_drift_apart_a_little() -> None:
    run = dataclasses.replace(a_run(), losses=((4.0, 2.0 * (1 + 5e-4)),))
    assert disagreements(a_run(), run) == []
    assert loss_difference(a_run(), run, 1) == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("weight", torch.tensor([1.0, -2.002]), 1e-3),
        ("weight", torch.tensor([math.nan, -2.0]), math.inf),
        ("weight", None, math.inf),
        ("key.bias", torch.tensor([1e-6]), 5e-3),  # 1e-6 / (1e-4 * 2)
    ],
)
def test_a_wrong_gradient_on_the_second_rank_disagrees(
    name: str, value: torch.Tensor | None, expected: float
) -> None:
    run = with_gradient(name, value)
    difference, where = largest_gradient_difference(a_run(), run)
    assert where == f"{name}, rank 1"
    assert difference == pytest.approx(expected, rel=1e-3)
    assert disagreements(a_run(), run)[0].startswith(f"a run: gradient of {name}, rank 1")


def test_noise_in_a_gradient_that_is_zero_in_theory_is_no_disagreement() -> None:
    assert disagreements(a_run(), with_gradient("key.bias", torch.tensor([-1e-9]))) == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_extra_memory_is_the_peak_and_not_what_remains() -> None:
    def step() -> None:
        for _ in range(3):
            torch.ones(64 * MIB // 4)  # 64 MiB at a time, freed at once

    measured = extra_bytes(step)
    assert measured is not None
    # Neither what remains (nothing) nor all three together (192 MiB).
    assert 60 * MIB < measured < 150 * MIB


def test_a_failing_run_says_which_rank_failed_and_where(tmp_path: Path) -> None:
    setting = Setting(name="bad", ranks=1, threads=1, arguments=("--no-such-option",))
    with pytest.raises(RunError, match=r"bad: rank 0 of 1: Traceback(.|\n)*in _options"):
        execute(setting, tmp_path)
    assert "--no-such-option" in (tmp_path / "bad.log").read_text()


@pytest.mark.ranks
def test_the_demo_succeeds_on_a_short_sequence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", *SMALL],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All runs agree" in done.stdout
    assert "model.layers.{0..3}.self_attn" in done.stdout


def steps_of(ranks: int, folder: Path, steps: int) -> dict[str, str]:
    """What ``examples.sharded_states`` prints of each step."""
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = ["--seq-len", "97", "--steps", str(steps), "--folder", str(folder)]
    done = subprocess.run(
        [
            sys.executable, *(launched if ranks > 1 else []), "-m", "examples.sharded_states",
            *arguments, "--compiler", "eager",
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    return {name: text for name, text in lines if name.startswith("step")}


@pytest.mark.slow  # tests/end_to_end/test_shard_states.py saves and loads too
@pytest.mark.ranks
def test_one_rank_goes_on_from_what_two_ranks_saved(tmp_path: Path) -> None:
    alone = steps_of(1, tmp_path / "one", 2)
    found = {**steps_of(2, tmp_path / "two", 1), **steps_of(1, tmp_path / "two", 1)}
    losses = [
        {name: float(text.split()[1][:-1]) for name, text in x.items()} for x in (alone, found)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


IN_TURN = (
    "accelerated", "diffusion", "encoder_decoder", "generation", "lora", "own_attention", "trainer",
    "vision",
)  # fmt: skip
"""Examples that print their result last."""


def last_lines(ranks: int) -> dict[str, list[str]]:
    """The words of what each example prints last, alone or under torchrun."""
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [
            sys.executable, *(launched if ranks > 1 else []), "-m",
            "tests.support.examples_in_turn", *IN_TURN,
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    name = ""
    for words in (line.split() for line in done.stdout.splitlines()):
        if words[:1] == ["example"]:
            name = words[1]
        elif words[:1] in (["loss"], ["image"], ["next"]):
            found[name] = words
    return found


@pytest.mark.ranks
def test_examples_print_the_same_on_one_rank_and_on_two() -> None:
    alone, split = last_lines(1), last_lines(2)
    assert [*alone] == [*split] == [*IN_TURN]
    for name in IN_TURN:
        for a, b in zip(alone[name], split[name], strict=True):
            if a.replace(".", "").isdecimal():
                assert float(a) == pytest.approx(float(b), abs=2e-3), name
            else:
                assert a == b, name


@pytest.mark.ranks
def test_a_killed_rank_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    def losses(folder: str, *more: str) -> tuple[dict[str, float], str]:
        launched = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
        launched += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        done = subprocess.run(
            [
                sys.executable, *launched, "-m", "examples.restart",
                "--folder", str(tmp_path / folder), "--compiler", "eager", *more,
            ],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (x.split(": loss ") for x in done.stdout.splitlines() if x.startswith("step"))
        return {step: float(loss) for step, loss in lines}, done.stderr

    whole, _ = losses("whole")
    killed, said = losses("killed", "--kill")
    assert killed == pytest.approx(whole, abs=1e-5)
    assert len(whole) == 6
    assert "exitcode: -9" in said, "a rank was really killed"


def test_a_cluster_is_planned_with_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import plan_cluster

    sys.argv = ["plan_cluster", "--layers", "2"]
    plan_cluster.main()
    said = capsys.readouterr().out
    assert said.count(" tokens: ") == 3
    assert "67,108,864 tokens: no choice of strategies fits" in said
    assert "tokens or fewer" in said
