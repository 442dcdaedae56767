"""The compilers that local programs, and the bodies of regions in chunks, are handed to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias, cast

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.compile.inductor_settings import inductor_settings
from ringfx.compile.offload import has_offloaded, move_offloaded
from ringfx.compile.prefetch import overlap_states
from ringfx.ir.token_place import TokenPlace
from ringfx.ops import chunked
from ringfx.ops.chunked import Body, Product, body_of
from ringfx.passes.chunks.products import factors_apart
from ringfx.torch_compat.dynamo import aot_eager
from ringfx.torch_compat.fake_tensors import (
    FakeTensor,
    FakeTensorMode,
    TracingContext,
    as_fake,
    detect_fake_mode,
)
from ringfx.torch_compat.inductor import compiled_by_inductor
from ringfx.torch_compat.offloading import moves_saved_values

__all__ = ["Compiled", "compile_bodies", "compile_local_program"]

Compiled: TypeAlias = Callable[..., Sequence[Any]]


def compile_local_program(gm: GraphModule, inputs: list[Any], compiler: str) -> Compiled:
    """Compile the local program."""
    if compiler == "eager":
        return gm.forward
    inputs = [_of_fixed_size(x) for x in inputs]
    with moves_saved_values() if has_offloaded(gm) else nullcontext():
        if compiler == "aot_eager":
            return cast(Compiled, aot_eager(gm, inputs, overlap_states, move_offloaded))
        return cast(Compiled, compiled_by_inductor(gm, inputs, inductor_settings()))


def _of_fixed_size(value: Any) -> Any:
    """A tensor that Dynamo has not seen as a fake one: else each of its sizes becomes a symbol.

    A program with symbols is slower, and one that no input of Dynamo's gives cannot be guarded.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None or not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor) or value in context.tensor_to_context:
        return value
    return as_fake(context.fake_mode, value)


def compile_bodies(bodies: Mapping[str, tuple[str, ...]], compiler: str) -> None:
    """Compile what a program runs of the bodies of its regions, for each length of chunks."""
    for key, programs in bodies.items():
        body = body_of(key)
        for tokens in body.sizes:
            for what in programs:
                if (what, tokens) not in body.compiled:
                    body.compiled[what, tokens] = _compiled(body, what, tokens, compiler)


def _compiled(body: Body, what: str, tokens: int, compiler: str) -> chunked.Compiled:
    # A body is shared by equal programs: its own tensors may be of another one's mode.
    mode = detect_fake_mode() or FakeTensorMode()
    with mode, torch.no_grad():
        inputs = _without_values(body.given, body.operands, tokens)
        if what == "backward":
            inputs += _without_values(body.values, body.results, tokens)
        traced: Callable[..., GraphModule] = make_fx(_function(body, what))
        program = traced(*inputs)
    products = factors_apart(program, _sums(body, what))
    if compiler != "inductor":
        return _with_products(program.forward, products)
    with torch.no_grad():
        compiled = compiled_by_inductor(program, inputs, inductor_settings())
        return _with_products(cast(Compiled, compiled), products)


def _sums(body: Body, what: str) -> list[int]:
    """The results of a program of the body that are gradients summed over chunks."""
    first = {"forward": None, "backward": 0, "loss": len(body.results)}[what]
    if first is None:
        return []
    return [first + i for i, wanted in enumerate(body.wanted) if body.operands[wanted] is None]


def _with_products(compiled: Compiled, products: Sequence[int]) -> chunked.Compiled:
    """The program with two results for each of ``products`` read as one."""
    if not products:
        return compiled

    def run(*parts: torch.Tensor) -> Sequence[torch.Tensor | Product]:
        results = list(compiled(*parts))
        for i in products:
            results[i : i + 2] = [Product(*results[i : i + 2])]
        return results

    return run


def _without_values(
    tensors: Sequence[torch.Tensor], places: Sequence[TokenPlace | None], tokens: int
) -> list[torch.Tensor]:
    """Parts of so many tokens, contiguous; what all tokens share is as it is."""
    return [
        torch.empty(
            x.shape if place is None else place.shape(x, tokens), dtype=x.dtype, device=x.device
        )
        for x, place in zip(tensors, places, strict=True)
    ]


def _function(body: Body, what: str) -> Callable[..., Any]:
    """Forward; backward, which takes operands and gradients of results; or a sum with gradients."""
    if what == "forward":
        return body.program

    def differentiated(*given: Any) -> Any:
        operands, grads = given[: len(body.operands)], given[len(body.operands) :]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(i in body.wanted) for i, x in enumerate(operands)]
            results = body.program(*leaves)
        pairs = [
            (x, g)
            for x, g in zip(results, grads or [torch.ones_like(r) for r in results], strict=True)
            if x.requires_grad
        ]
        found = torch.autograd.grad(
            [x for x, _ in pairs],
            [leaves[i] for i in body.wanted],
            [g for _, g in pairs],
            materialize_grads=True,
        )
        return (*(() if grads else (r.detach() for r in results)), *found)

    return differentiated
