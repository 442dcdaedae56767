"""Packages' calls are traced as spellings for ringfx, and as ever for everybody else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringfx
from ringfx.ir.note import texts_of
from ringfx.passes.detect import detect
from ringfx.passes.detect.kernel_calls import flash, packed_flash
from ringfx.passes.detect.substitute import adapted, keep_substituting
from tests.models.calls import DIM, HEADS, Around, by_heads, embedded
from tests.models.package_calls import RAN, attend_by_flash, attend_by_xformers, attn_bias
from tests.support.programs import captured

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def none_ran() -> None:
    torch._dynamo.reset()
    RAN.clear()


def causal_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = attend_by_flash(q, k, v, causal=True)
    return out


def operators(model: nn.Module, backend_of: Callable[[Any], Any] = lambda f: f) -> set[str]:
    """The operators that an ordinary backend is given."""
    seen: set[str] = set()

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.update(getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes)
        return gm.forward

    torch.compile(model, backend=backend_of(backend))(*embedded())
    return seen


def test_the_package_does_not_run_where_its_spelling_does() -> None:
    model = ringfx.optimize(Around(causal_flash), compiler="eager")
    model(*embedded())
    assert RAN == []
    assert [layer.found_by for layer in model.plan.layers] == ["flash_attn_func"]


def test_the_string_backend_sees_the_spelling_too() -> None:
    compiled = torch.compile(Around(causal_flash), backend="ringfx", options={"compiler": "eager"})
    assert torch.equal(compiled(*embedded()), compiled(*embedded()))
    assert RAN == []


@pytest.mark.slow
def test_an_ordinary_compilation_is_what_it_was() -> None:
    keep_substituting()
    before = operators(Around(causal_flash))
    assert not [name for name in before if "scaled_dot_product" in name]
    assert RAN, "the package's own function runs"
    model = ringfx.optimize(Around(causal_flash), compiler="eager")
    model(*embedded())
    torch._dynamo.reset()
    assert operators(Around(causal_flash)) == before


def test_two_compilers_in_one_process_each_see_their_own() -> None:
    """No reset between them: what one compiled is not the other's."""
    shared = Around(causal_flash)
    ours = ringfx.optimize(shared, compiler="eager")
    theirs = torch.compile(shared, backend="eager")
    x = embedded()
    for _ in range(2):
        ours(*x)
        assert RAN == []
        theirs(*x)
        assert RAN == ["flash_attn_func"]
        RAN.clear()


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys, ringfx, ringfx.compile.backend\n"
        "print([m for m in sys.modules if m.split('.')[0] in"
        " ('flash_attn', 'flash_attn_interface', 'xformers')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_bias_without_a_spelling_leaves_the_call_to_the_package() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend_by_xformers(q, k, v, bias=attn_bias.BlockDiagonalPaddedKeysMask)

    model: Any = ringfx.optimize(Around(core), compiler="eager")
    model(*embedded())
    assert "with BlockDiagonalPaddedKeysMask: the package's" in " ".join(texts_of(model.plan.notes))
    assert RAN == ["memory_efficient_attention"]


def test_arguments_are_matched_by_name_across_versions() -> None:
    def spelling(q: int, k: int, dropout: float = 0.0, softcap: float = 0.0) -> Any:
        return q, k, dropout, softcap

    def older(q: int, dropout: float = 0.0, k: int = 0) -> None: ...
    def newer(
        q: int, k: int, dropout: float = 0.0, softcap: float = 0.0, sink: int = 0
    ) -> None: ...
    def other(q: int) -> None: ...

    assert adapted(older, spelling)(1, 0.5, 2) == (1, 2, 0.5, 0.0)
    assert adapted(newer, spelling) is None, "it may mean something that the spelling ignores"
    assert adapted(other, spelling) is None


def declined(core: Callable[..., Tensor], **around: Any) -> list[str]:
    program = captured(by_heads(core, **around)(), *embedded())
    found = detect(program)
    assert not found.candidates
    return [d.reason for d in found.declined]


def test_a_kernel_whose_weights_are_used_is_left_with_the_reason() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = aten._scaled_dot_product_attention_math(q, k, v)
        return out * weights.sum(-1, keepdim=True)

    assert declined(core) == ["its result 1 is used, which a split attention does not return"]


def test_a_kernel_whose_logsumexp_is_used_is_left_with_the_reason() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out * lse[..., None].to(out.dtype)

    assert declined(core) == ["its logsumexp is used, which a split attention does not return"]


def test_a_kernel_that_aligns_otherwise_is_refused() -> None:
    q, k = torch.zeros(1, HEADS, 5, DIM), torch.zeros(1, HEADS, 7, DIM)
    with pytest.raises(ValueError, match="aligns bottom-right and scaled_dot_product_attention"):
        flash(q, k, k, 0.0, True, False, None)


def test_the_packed_kernel_is_the_same_attention_document_by_document() -> None:
    q, k, v = (torch.randn(9, HEADS, DIM, dtype=torch.float64) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    options = dict.fromkeys(("scale", "window_size_right", "seqused_k", "alibi_slopes"))
    out = packed_flash(
        q, k, v, cu, cu, 5, 5, 0.0, True, False, window_size_left=1, **options
    )  # fmt: skip
    for start, stop in ((0, 4), (4, 9)):
        rows = torch.arange(stop - start)
        keep = (rows[:, None] >= rows) & (rows[:, None] - rows <= 1)
        parts = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*parts, keep)
        torch.testing.assert_close(out[start:stop], expected[0].transpose(0, 1))


def test_the_fused_multi_head_operator_is_found_and_equal() -> None:
    torch.manual_seed(0)
    inner = nn.MultiheadAttention(24, 3, batch_first=True).double().eval()

    def call(x: Tensor) -> Tensor:
        hidden = (torch.arange(2)[:, None] == 1) & (torch.arange(11) > 6)
        out: Tensor = aten._native_multi_head_attention(
            x, x, x, 24, 3, inner.in_proj_weight, inner.in_proj_bias, inner.out_proj.weight,
            inner.out_proj.bias, hidden, False, True, 1,
        )[0]  # fmt: skip
        return out

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    with torch.no_grad():
        x = torch.randn(2, 11, 24, dtype=torch.float64)
        model = ringfx.optimize(Fused(), compiler="eager")
        torch.testing.assert_close(model(x), call(x))
    assert [layer.found_by for layer in model.plan.layers] == ["sdpa"]
