"""What cannot be done right is refused in words, on every rank, before a wrong number or a hang."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import ringfx
from tests.end_to_end.models import llama, plain, tokens
from tests.support.harness import RankPool, error_text, raises


def call(model: nn.Module, drawn: torch.Tensor, **options: Any) -> Any:
    return ringfx.optimize(model, **{"compiler": "eager"} | options)(drawn)


def features() -> None:
    call(nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 8)), torch.randn(16, 8))


def test_a_model_without_tokens(ranks2: RankPool) -> None:
    for text in raises(ranks2, features):
        assert text.startswith("AttentionNotFound: no attention over a sequence was found")
        assert "softmax(q k^T) v over tokens in any form" in text
        assert "ringfx explain" in text


class HiddenLow(nn.Module):
    """Two masks are added: one of a low number, on keys that the other one keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, input_ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(input_ids)).chunk(3, dim=-1)
        later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        low = torch.zeros_like(later, dtype=q.dtype).masked_fill(later, -1e13)
        result: torch.Tensor = (q @ k.mT + low + padding[:, None]).softmax(-1) @ v
        return result


def low_numbers() -> None:
    padding = torch.where(torch.arange(16) < 3, -torch.inf, 0.0)[None].double()
    model = ringfx.optimize(HiddenLow().double(), compiler="eager")
    model(tokens(16), padding)[:, 1:].sum().backward()


def test_rows_whose_digits_are_lost_are_refused_on_all_ranks(ranks2: RankPool) -> None:
    for text in raises(ranks2, low_numbers):
        assert text.startswith("InvalidArgument: qkv: a bias hides all keys of some queries with")
        assert "between -2.1e+09 and -5.8e+17, beside which float64 keeps a few digits" in text


def unknown_strategy() -> None:
    call(plain()(), tokens(16), strategy="quickest")


def test_an_unknown_strategy_lists_the_known_ones(ranks2: RankPool) -> None:
    for text in raises(ranks2, unknown_strategy):
        assert text.startswith("InvalidArgument: ")
        assert "'quickest'" in text
        for name in ("auto", "simple", "collective", "production", "ulysses"):
            assert name in text


def unknown_compiler() -> None:
    call(plain()(), tokens(16), compiler="gcc")


def test_an_unknown_compiler_lists_the_known_ones(ranks2: RankPool) -> None:
    for text in raises(ranks2, unknown_compiler):
        assert text.startswith("InvalidArgument: ")
        assert 'compiler="gcc"' in text
        assert "aot_eager" in text


def strategy_for_no_layer() -> None:
    call(plain()(), tokens(16), strategy={"blocks.7.*": "simple"})


def test_a_pattern_that_matches_no_layer_lists_the_layers(ranks2: RankPool) -> None:
    for text in raises(ranks2, strategy_for_no_layer):
        assert text.startswith("InvalidArgument: ")
        assert "blocks.7.*" in text
        assert "blocks.0" in text


def heads_do_not_divide() -> None:
    call(plain()(), tokens(16), strategy="ulysses")


def test_a_strategy_that_cannot_run_names_the_layer_and_the_numbers(ranks3: RankPool) -> None:
    for text in raises(ranks3, heads_do_not_divide):
        assert text.startswith("StrategyRefused: ")
        assert "blocks.0" in text
        assert "models.py:" in text
        assert "4 heads" in text
        assert "3 ranks" in text


def mesh_of_words() -> None:
    call(plain()(), tokens(16), mesh="everyone")


def mesh_of_two_dimensions() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tokens"))
    call(plain()(), tokens(16), mesh=mesh)


@pytest.mark.parametrize("function", [mesh_of_words, mesh_of_two_dimensions])
def test_a_mesh_of_the_wrong_kind(ranks2: RankPool, function: Callable[[], None]) -> None:
    for text in raises(ranks2, function):
        assert text.startswith("InvalidArgument: ")
        assert "mesh" in text


def one_mesh_dimension(seq_len: int) -> float:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tokens"))
    drawn = tokens(seq_len)
    with torch.no_grad():
        ours = call(plain()(), drawn, mesh=mesh["tokens"])
        return float((ours - plain()()(drawn)).abs().max())


def test_one_dimension_of_a_mesh_is_the_right_kind(ranks2: RankPool) -> None:
    assert max(ranks2.run(one_mesh_dimension, 16)) < 1e-5


def different_lengths() -> None:
    call(plain()(), tokens(16 + dist.get_rank()))


def test_ranks_with_different_input_shapes(ranks2: RankPool) -> None:
    for text in raises(ranks2, different_lengths):
        assert text.startswith("AgreementError: ")
        assert "16" in text
        assert "17" in text
        assert "rank 0" in text
        assert "rank 1" in text


class NoLonger(torch.nn.Module):
    """Fails by itself beyond 16 tokens, in code that Dynamo traces."""

    def __init__(self) -> None:
        super().__init__()
        self.model = plain()()

    def forward(self, tokens: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens + torch.zeros(16, dtype=torch.int64))
        return logits


def a_length_that_the_model_refuses() -> None:
    drawn = tokens(16 + dist.get_rank())
    ringfx.optimize(NoLonger(), compiler="eager")(drawn, drawn)


def test_shapes_are_compared_before_the_model_fails_on_one_rank(ranks2: RankPool) -> None:
    for text in raises(ranks2, a_length_that_the_model_refuses):
        assert text.startswith("AgreementError: rank 0 and rank 1 were given inputs of different")
        assert "tokens: rank 0 (1, 16) int64, rank 1 (1, 17) int64" in text
        assert "more: rank 0 (1, 16)" in text


def different_strategies() -> None:
    call(plain()(), tokens(16), strategy=("simple", "collective")[dist.get_rank()])


def test_ranks_with_different_plans(ranks2: RankPool) -> None:
    for text in raises(ranks2, different_strategies):
        assert text.startswith("AgreementError: ")
        assert "simple" in text
        assert "collective" in text


def different_tokens_on_the_second_call() -> None:
    model = ringfx.optimize(plain()(), compiler="eager")
    model(tokens(16))
    model(tokens(16, seed=5 + dist.get_rank()))


def test_ranks_with_different_tokens_on_any_call(ranks2: RankPool) -> None:
    """A DistributedSampler left in place: shapes are equal, data is not."""
    for text in raises(ranks2, different_tokens_on_the_second_call):
        assert text.startswith("AgreementError: ")
        assert "input_ids" in text
        assert "rank 0" in text
        assert "rank 1" in text


class Modal(nn.Module):
    """Something that is another program in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.model = plain()()
        self.drop = nn.Dropout(0.1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.drop(self.model(input_ids))
        return result


def no_grad_on_rank_1(warm: bool) -> None:
    model = ringfx.optimize(plain()(), compiler="eager")
    if warm:  # both programs are compiled already
        model(tokens(16)).sum().backward()
        with torch.no_grad():
            model(tokens(16))
    with torch.set_grad_enabled(dist.get_rank() == 0):
        model(tokens(16))


@pytest.mark.parametrize("warm", [False, True])
def test_one_rank_without_gradients(ranks2: RankPool, warm: bool) -> None:
    for text in raises(ranks2, no_grad_on_rank_1, warm):
        assert text.startswith("AgreementError: rank 1 runs this call under torch.no_grad()")
        assert "every rank or on none" in text


def evaluation_on_rank_1() -> None:
    model = Modal().train(dist.get_rank() == 0)
    call(model, tokens(16))


def test_one_rank_in_evaluation_mode(ranks2: RankPool) -> None:
    for text in raises(ranks2, evaluation_on_rank_1):
        assert text.startswith("AgreementError: the model is in evaluation mode on rank 1 and in")
        assert "model.train() or model.eval() on every rank" in text


def frozen_on_rank_1() -> None:
    model: Any = plain()()
    model.head.weight.requires_grad_(dist.get_rank() == 0)
    call(model, tokens(16))


def test_one_rank_with_a_frozen_parameter(ranks2: RankPool) -> None:
    for text in raises(ranks2, frozen_on_rank_1):
        assert text.startswith("AgreementError: head.weight requires a gradient on rank 0 but not")
        assert "freeze the same parameters" in text


def no_tokens() -> None:
    call(plain()(), tokens(0, 2))


def test_an_empty_sequence(ranks2: RankPool) -> None:
    for text in raises(ranks2, no_tokens):
        assert text.startswith("InvalidArgument: blocks.0")
        assert "attention of 0 queries over 0 keys" in text
        assert "skip empty batches" in text


def inputs_without_values() -> None:
    call(plain()(), tokens(16).to("meta"))


def test_inputs_on_the_meta_device(ranks2: RankPool) -> None:
    for text in raises(ranks2, inputs_without_values):
        assert text.startswith("InvalidArgument: input_ids (1, 16) is on the meta device")
        assert "ringfx.plan" in text


def a_part_that_is_compiled() -> None:
    model: Any = plain()()
    model.blocks[1] = ringfx.optimize(model.blocks[1], compiler="eager")
    call(model, tokens(16))


def test_a_part_that_is_optimized_already(ranks2: RankPool) -> None:
    for text in raises(ranks2, a_part_that_is_compiled):
        assert text.startswith("InvalidArgument: blocks.1 is already compiled")


def group_of_rank_0() -> None:
    call(plain()(), tokens(16), mesh=dist.new_group([0]))


def test_a_group_without_this_rank(ranks2: RankPool) -> None:
    texts = ranks2.run(error_text, group_of_rank_0)
    assert texts[0] is None
    assert texts[1].startswith("InvalidArgument: this rank is not in the mesh")


class OnVectors(nn.Module):
    """Attention over float inputs, with whatever is done to its result."""

    def __init__(self, afterwards: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.project = nn.Linear(8, 8)
        self.afterwards = afterwards

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        result = mixed.transpose(1, 2).flatten(2)
        return result if self.afterwards is None else self.afterwards(result)


def vectors(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(seed))


def different_vectors() -> None:
    call(OnVectors(), vectors(dist.get_rank()))


def test_ranks_with_different_float_inputs_on_the_first_call(ranks2: RankPool) -> None:
    for text in raises(ranks2, different_vectors):
        assert text.startswith("AgreementError: ")
        assert "x" in text


def different_weights() -> None:
    model = OnVectors()
    if dist.get_rank() == 1:
        nn.init.normal_(model.project.weight)
    call(model, vectors())


def test_ranks_that_start_from_different_weights(ranks2: RankPool) -> None:
    for text in raises(ranks2, different_weights):
        assert text.startswith("AgreementError: ")
        assert "project.weight" in text


@torch.library.custom_op("ringfx_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """Mixes tokens in a way that no axis rule can know."""
    return x.flip(1).cumsum(1)


@mystery.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def without_a_rule(on_unsupported: str) -> float:
    with torch.no_grad():
        ours = call(OnVectors(mystery), vectors(), on_unsupported=on_unsupported)
        return float((ours - OnVectors(mystery)(vectors())).abs().max())


def test_an_operator_without_an_axis_rule_is_named_with_its_line(ranks2: RankPool) -> None:
    for text in raises(ranks2, without_a_rule, "error"):
        assert text.startswith("NoAxisRule: ")
        assert "ringfx_tests.mystery" in text.replace("::", ".")
        assert "test_bad_input.py:" in text
        assert 'on_unsupported="gather"' in text


def test_it_may_be_gathered_instead_and_stays_right(ranks2: RankPool) -> None:
    assert max(ranks2.run(without_a_rule, "gather")) < 1e-5


def broken_in_the_middle(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x.cumsum(1).sin()


def a_broken_graph() -> tuple[float, list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfx").addHandler(handler)
    with torch.no_grad():
        ours = call(OnVectors(broken_in_the_middle), vectors())
        difference = float((ours - OnVectors(broken_in_the_middle)(vectors())).abs().max())
    logging.getLogger("ringfx").removeHandler(handler)
    return difference, said


def test_a_graph_break_shows_the_frame_and_stays_right(ranks2: RankPool) -> None:
    for difference, said in ranks2.run(a_broken_graph):
        assert difference < 1e-5
        assert any("graph break at" in text and "test_bad_input.py:" in text for text in said), said


def test_after_an_error_the_same_ranks_go_on(ranks2: RankPool) -> None:
    """A refusal loses nothing: the group still works and a right call still runs."""
    assert max(ranks2.run(after_a_refusal)) < 1e-5


def after_a_refusal() -> float:
    drawn = tokens(16)
    for bad in (features, different_lengths, different_strategies):
        with pytest.raises(ringfx.RingfxError):
            bad()
    with torch.no_grad():
        return float((call(plain()(), drawn) - plain()()(drawn)).abs().max())


def llama_in_a_dictionary_of_layers() -> list[str]:
    """A mapping from module-path patterns to strategies."""
    chosen = {"model.layers.0.*": "simple", "model.layers.1.*": "collective"}
    model: Any = ringfx.optimize(llama()(), compiler="eager", strategy=chosen)
    model(input_ids=tokens(16), labels=tokens(16)).loss.backward()
    return [layer.strategy for layer in model.plan.layers]


def test_strategies_by_module_path(ranks2: RankPool) -> None:
    assert ranks2.run(llama_in_a_dictionary_of_layers) == [["simple", "collective"]] * 2
