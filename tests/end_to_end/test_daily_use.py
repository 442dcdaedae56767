"""What scripts of every day do around a model, and the words they are answered in."""

from __future__ import annotations

import functools
import gc
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ringfx
from ringfx.split_tensor.handoff import outside_of_libraries
from tests.end_to_end.models import llama, plain, tokens
from tests.support.harness import RankPool, raises

optimize = functools.partial(ringfx.optimize, compiler="eager")


@contextmanager
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def resized(model: Any) -> float:
    """The loss after a step, and after the same parameters got another shape."""
    drawn = tokens(13)
    model(input_ids=drawn, labels=drawn).loss.backward()
    model.zero_grad()
    model.resize_token_embeddings(101, mean_resizing=False)
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, model.lm_head.weight):
            parameter[96:] = 0.1
    loss = model(input_ids=drawn, labels=drawn).loss
    loss.backward()
    return float(loss.detach())


def test_nothing_keeps_the_graph_of_the_first_step() -> None:
    """AccumulateGrad of the old shape would be found again: no reference cycle may hold it."""
    with without_collection():
        found = resized(optimize(llama()()))
    assert found == pytest.approx(resized(llama()()), abs=1e-5)


class Wrapped(nn.Module):
    """Its forward stands behind ``*args``, as decorators leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()()

    def forward(self, *args: Any) -> Any:
        return self._forward(*args)

    def _forward(self, words: torch.Tensor) -> Any:
        return self.inner(words)


def _decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated(Wrapped):
    @_decorated
    def forward(self, words: torch.Tensor) -> Any:
        return self.inner(words)


class Broken(Wrapped):
    def forward(self, words: torch.Tensor) -> Any:
        twice = words * 2
        torch._dynamo.graph_break()
        return self.inner(twice // 2)


def differing(name: str) -> None:
    """Every rank gives other numbers."""
    torch._dynamo.reset()
    if name == "torch":
        layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        optimize(layer)(torch.full((1, 8, 16), float(dist.get_rank())))
    else:
        kind = {"decorated": Decorated, "positional": Wrapped, "broken": Broken}[name]
        optimize(kind())(tokens(8, seed=dist.get_rank()))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "word"),
    [("torch", "src"), ("decorated", "words"), ("positional", "argument 0"), ("broken", "words")],
)
def test_an_error_names_forwards_own_arguments(ranks2: RankPool, name: str, word: str) -> None:
    for text in raises(ranks2, differing, name):
        assert text.startswith("AgreementError"), text
        assert f"{word} " in text, text
        assert "___" not in text
        assert ("argument" in text.split("Do:")[0]) == (name == "positional"), text


def paths_of_layers() -> list[str]:
    torch._dynamo.reset()
    model: Any = optimize(Decorated())
    model(tokens(8))
    return [layer.name for layer in model.plan.layers]


@pytest.mark.ranks
def test_paths_of_layers_are_the_users(ranks2: RankPool) -> None:
    for paths in ranks2.run(paths_of_layers):
        assert all(path.startswith("inner.") for path in paths), paths


def test_a_line_of_a_library_comes_with_the_users_that_called_it() -> None:
    """Code that is compiled as a file below site-packages stands for accelerate's loop."""
    library: dict[str, Any] = {"__name__": "accelerate.loop"}
    file = f"{sysconfig.get_path('purelib')}/accelerate/loop.py"
    exec(compile("def run(function):\n    return function()", file, "exec"), library)
    assert outside_of_libraries() == ""  # pytest runs this line, and is a library, but it is here
    named = library["run"](outside_of_libraries)
    assert named.startswith(f"{__file__}:")
    assert named.endswith("in test_a_line_of_a_library_comes_with_the_users_that_called_it")
