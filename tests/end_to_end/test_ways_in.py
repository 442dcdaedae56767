"""However a model is run, it is split, or an error or a warning says why not."""

from __future__ import annotations

import copy
import functools
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

import ringfx
from ringfx.comm.world import World
from ringfx.errors import InvalidArgument, ProfileError
from ringfx.split_tensor.tensor import SplitTensor
from tests.end_to_end.models import PlainTransformer, llama, plain, shifted_loss, tokens
from tests.support.harness import RankPool, gradient_differences, raises

pytestmark = pytest.mark.ranks

LENGTH = 13
optimize = functools.partial(ringfx.optimize, compiler="eager")


# --- ways of calling ----------------------------------------------------------------------------


def forward(model: Any, x: torch.Tensor) -> Any:
    return model.forward(x)


def patched_forward(model: Any, x: torch.Tensor) -> Any:
    """As accelerate wraps it: the function behind the method, bound to the model again."""
    inside = model.forward.__func__
    model.forward = types.MethodType(lambda *args, **kwargs: inside(*args, **kwargs), model)
    return model(x)


def compiled_again(model: Any, x: torch.Tensor) -> Any:
    compiled: Any = torch.compile(model, backend="eager")
    return compiled(x)


def in_a_compiled_function(model: Any, x: torch.Tensor) -> Any:
    return torch.compile(lambda y: model(y), backend="eager")(x)


def compile_method(model: Any, x: torch.Tensor) -> Any:
    model.compile()
    return model(x)


def parameters_given(model: Any, x: torch.Tensor) -> Any:
    return torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def deep_copied(model: Any, x: torch.Tensor) -> Any:
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    result = twin(x)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.register_hook(functools.partial(_into, mine))
    return result


def _into(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    parameter.grad = gradient.clone()


def with_hooks(model: Any, x: torch.Tensor) -> Any:
    model.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    model.register_forward_hook(lambda module, args, out: out * 1)
    return model(x)


WAYS: tuple[Callable[[Any, torch.Tensor], Any], ...] = (
    forward, patched_forward, compiled_again, in_a_compiled_function, compile_method,
    parameters_given, deep_copied, with_hooks,
)  # fmt: skip


def run_by(way: Callable[[Any, torch.Tensor], Any]) -> tuple[str, float, float]:
    torch._dynamo.reset()
    stock, x = plain()(), tokens(LENGTH)
    source = copy.deepcopy(stock)
    model: Any = optimize(source)
    expected, out = stock(x), way(model, x)
    shifted_loss(expected, x).backward()
    shifted_loss(out, x).backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, stock))
    return (
        type(out).__name__,
        _worst(out, expected),
        max(gradient_differences(ours, theirs).values()),
    )


def _worst(out: torch.Tensor, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((out - expected).abs().max())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_way_of_calling_is_split(ranks2: RankPool, way: Any) -> None:
    for kind, output, gradient in ranks2.run(run_by, way):
        assert kind == SplitTensor.__name__
        assert output < 1e-5
        assert gradient < 1e-4


# --- hooks that come and go ---------------------------------------------------------------------


def on_output(part: nn.Module) -> Any:
    return part.register_forward_hook(lambda module, args, out: out * 1.5)


def on_input(part: nn.Module) -> Any:
    return part.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def on_gradient(part: nn.Module) -> Any:
    def doubled(module: nn.Module, given: Any, got: Any) -> Any:
        return (given[0] * 2,)

    return part.register_full_backward_hook(doubled)


def on_all(part: nn.Module) -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 1.5 if isinstance(module, nn.Linear) else out
    )


def hooked(model: Any, register: Callable[[nn.Module], Any]) -> list[torch.Tensor]:
    """Outputs and gradients of a call without the hook, one with it, and one without it again."""
    x, found = tokens(LENGTH), []
    for with_it in (False, True, False):
        handle = register(model.blocks[0]) if with_it else None
        out = model(x)
        found += [out, *torch.autograd.grad(shifted_loss(out, x), list(model.parameters()))]
        if handle is not None:
            handle.remove()
    return found


def hooked_later(register: Callable[[nn.Module], Any], way: Callable[[nn.Module], Any]) -> float:
    torch._dynamo.reset()
    ours, theirs = hooked(way(plain()()), register), hooked(plain()(), register)
    return max(_worst(mine, other) for mine, other in zip(ours, theirs, strict=True))


def by_torch_compile(model: nn.Module) -> Any:
    return torch.compile(model, backend="ringfx", options={"compiler": "eager"})


@pytest.mark.parametrize(
    ("register", "way"),
    [
        (on_output, optimize), (on_input, optimize), (on_gradient, optimize), (on_all, optimize),
        (on_output, by_torch_compile),
    ],
)  # fmt: skip
def test_a_hook_that_comes_or_goes_after_the_first_call_counts(
    ranks2: RankPool, register: Any, way: Any
) -> None:
    assert max(ranks2.run(hooked_later, register, way)) < 1e-5


# --- roots of torch.nn --------------------------------------------------------------------------


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)


ROOTS: tuple[Callable[[], nn.Module], ...] = (
    encoder_layer,
    lambda: nn.TransformerEncoder(encoder_layer(), 2),  # type: ignore[arg-type]
    lambda: nn.Sequential(encoder_layer(), nn.Linear(32, 8)),
    lambda: nn.Sequential(nn.LayerNorm(32), nn.Sequential(encoder_layer())),
)


def root(number: int) -> tuple[str, float, float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = ROOTS[number]()
    model = optimize(copy.deepcopy(stock))
    x = torch.randn(2, LENGTH, 32)
    out, expected = model(x), stock(x)
    weight = torch.randn(expected.shape)
    for y in (out, expected):
        (y * weight).sum().backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, stock))
    return (
        type(out).__name__,
        _worst(out, expected),
        max(gradient_differences(ours, theirs).values()),
    )


@pytest.mark.parametrize("number", range(len(ROOTS)))
def test_roots_of_torch_nn_are_split(ranks2: RankPool, number: int) -> None:
    for kind, output, gradient in ranks2.run(root, number):
        assert kind == SplitTensor.__name__
        assert output < 1e-5
        assert gradient < 1e-4


# --- parts --------------------------------------------------------------------------------------


def a_part() -> tuple[str, float, bool, int, str]:
    torch._dynamo.reset()
    stock: Any = llama()()
    model: Any = optimize(copy.deepcopy(stock))
    x = tokens(LENGTH)
    hidden = model.model(input_ids=x).last_hidden_state
    worst = _worst(hidden, stock.model(input_ids=x).last_hidden_state)
    whole = model(input_ids=x).logits
    same = model.model is model.model and type(model.model).__name__ == "LlamaModel"
    return type(hidden).__name__, worst, same, len(model.plan.layers), type(whole).__name__


def test_a_part_that_is_called_by_itself_is_split(ranks2: RankPool) -> None:
    for kind, worst, same, num_layers, whole in ranks2.run(a_part):
        assert (kind, same, num_layers, whole) == ("SplitTensor", True, 2, "SplitTensor")
        assert worst < 1e-5


def an_encoder_of_generate() -> tuple[str, bool]:
    """``generate`` calls ``get_encoder()`` by itself, over the long source."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    configured: Any = T5Config
    config = configured(**sizes, num_heads=4, decoder_start_token_id=0)
    stock: Any = T5ForConditionalGeneration(config).train(False)
    model: Any = optimize(copy.deepcopy(stock))
    x = tokens(LENGTH, vocab=61)
    with torch.no_grad():
        encoded = model.get_encoder()(x).last_hidden_state
        made = [m.generate(x, max_new_tokens=3, do_sample=False).tolist() for m in (model, stock)]
    return type(encoded).__name__, made[0] == made[1]


def test_the_encoder_of_generate_is_split(ranks2: RankPool) -> None:
    assert ranks2.run(an_encoder_of_generate) == [("SplitTensor", True)] * 2


def blocks() -> list[nn.Module]:
    model = plain()()
    assert isinstance(model, PlainTransformer)
    return list(model.blocks)


class Stem(nn.Module):
    """Embeddings in a module of their own, as encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Embedding(96, 48), nn.LayerNorm(48))
        self.body = nn.Sequential(*blocks())

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self.stem(x))


def a_part_without_attention() -> tuple[str, float]:
    torch.manual_seed(0)
    stock = Stem()
    model: Any = optimize(copy.deepcopy(stock))
    out = model.stem(tokens(LENGTH))
    return type(out).__name__, _worst(out, stock.stem(tokens(LENGTH)))


def test_a_part_without_attention_is_split_too(ranks2: RankPool) -> None:
    assert ranks2.run(a_part_without_attention) == [("SplitTensor", 0.0)] * 2


def under_a_checkpoint(reentrant: bool) -> tuple[str, float]:
    stock = nn.Sequential(*blocks())
    model = optimize(copy.deepcopy(stock))
    x = torch.linspace(0, 1, LENGTH * 48).view(1, LENGTH, 48)
    given = [x.clone().requires_grad_() for _ in range(2)]
    out = checkpoint(model, given[0], use_reentrant=reentrant)
    out.square().mean().backward()
    stock(given[1]).square().mean().backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, stock))
    return type(out).__name__, max(gradient_differences(ours, theirs).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_optimized_model_may_be_checkpointed(ranks2: RankPool, reentrant: bool) -> None:
    for kind, gradient in ranks2.run(under_a_checkpoint, reentrant):
        assert kind == SplitTensor.__name__
        assert gradient < 1e-4


# --- the ranks are looked up when the model is called -------------------------------------------


@contextmanager
def without_a_group() -> Iterator[None]:
    """As before ``init_process_group``, in one process alone."""
    with (
        mock.patch.object(dist, "is_initialized", return_value=False),
        mock.patch.dict(os.environ, WORLD_SIZE="1"),
    ):
        yield


def late() -> tuple[int, int]:
    with without_a_group():
        model: Any = optimize(plain()())
    model(tokens(LENGTH))
    return model.plan.world_size, len(model.plan.axes)


def test_optimize_may_come_before_the_process_group(ranks2: RankPool, ranks3: RankPool) -> None:
    assert ranks2.run(late) == [(2, 1)] * 2
    assert ranks3.run(late) == [(3, 1)] * 3


def made_between_two_calls() -> tuple[int, int]:
    model: Any = optimize(plain()())
    with without_a_group():
        model(tokens(LENGTH))
        before = model.plan.world_size
    model(tokens(LENGTH))
    return before, model.plan.world_size


def test_a_group_made_between_two_calls_is_used(ranks2: RankPool) -> None:
    assert ranks2.run(made_between_two_calls) == [(1, 2)] * 2


def stale_backend() -> None:
    model = torch.compile(plain()(), backend="ringfx", options={"compiler": "eager"})
    with without_a_group():
        model(tokens(LENGTH))
    model(tokens(LENGTH))


def test_programs_of_the_backend_made_for_other_ranks_are_refused(ranks2: RankPool) -> None:
    for text in raises(ranks2, stale_backend):
        assert text.startswith("AgreementError: this program was compiled for 1 rank(s)")
        assert "now there are 2" in text


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_without_a_group_are_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    model = optimize(plain()())  # before init_process_group, as with Trainer
    with pytest.raises(InvalidArgument, match=rf"{name}=2 says that 2 processes were started"):
        model(tokens(LENGTH))
    monkeypatch.setenv(name, "1")
    assert World.of(None) == World(1)


def test_an_unknown_profile_is_an_error_at_once_where_all_ranks_see_the_same_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    optimize(plain()(), profile="nope")  # rank 0's machine may have it: found at the first call
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ProfileError, match="there is no profile 'nope'"):
        optimize(plain()(), profile="nope")
