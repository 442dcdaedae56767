"""Regions of a program that run over this rank's tokens in chunks: operators, opaque to compilers.

What is wide inside a region (an MLP's inner values, logits) exists for one chunk only, forward and
backward. Three ``torch.library`` operators:

- ``ringfx::chunked`` runs the region forward. Its backward, ``ringfx::chunked_backward``, computes
  each chunk again and takes its gradients.
- ``ringfx::chunked_loss`` is for a region that ends in one sum over tokens: the gradients of that
  sum are computed with it, chunk by chunk, and nothing again; backward multiplies them.

Gradients of operands that all tokens share (weights) are summed over chunks: products of matrices
in place, so that a weight's gradient exists once; in float32 where the operand is of 16 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from ringfx.comm.autograd_function import register_autograd
from ringfx.comm.double_backward import once_differentiable, refuse_double_backward
from ringfx.errors import DEFECT, RingfxError
from ringfx.ir.token_place import TokenPlace

__all__ = ["Body", "Compiled", "Product", "body_of", "chunked", "chunked_loss", "registered"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """A chunk's part of a sum, by its factors: ``left`` [m, k] @ ``right`` [k, n]."""

    left: Tensor
    right: Tensor


Compiled = Callable[..., Sequence[Tensor | Product]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Body:
    """A region as a program of its own, for any number of tokens."""

    program: GraphModule
    """Operands -> results."""
    operands: tuple[TokenPlace | None, ...]
    """Where each operand has its tokens; None: all tokens share it."""
    results: tuple[TokenPlace | None, ...]
    """Where each result has its tokens; None: a sum over them."""
    wanted: tuple[int, ...]
    """Operands that a gradient is wanted of."""
    tokens: int
    """Of this rank, padding included."""
    chunk: int
    """Tokens of one chunk; the last may be shorter."""
    compiled: dict[tuple[str, int], Compiled] = field(default_factory=dict)
    """(what, tokens) -> a function of parts; ``what`` is forward, backward or loss."""

    @property
    def given(self) -> list[Tensor]:
        """Operands without values, of all the rank's tokens."""
        return [n.meta["val"] for n in self.program.graph.find_nodes(op="placeholder")]

    @property
    def values(self) -> list[Tensor]:
        """Results without values, of all the rank's tokens."""
        results: Any = self.program.graph.output_node().args[0]
        return [n.meta["val"] for n in results]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different lengths of chunks."""
        return tuple(dict.fromkeys(stop - start for start, stop in self.chunks()))

    def chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.tokens, self.chunk):
            yield start, min(start + self.chunk, self.tokens)

    def begun(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Operands as the compiled programs take them: what all chunks share is contiguous."""
        return [
            x.contiguous() if place is None else x
            for x, place in zip(operands, self.operands, strict=True)
        ]

    def part(self, operands: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """Operands of the tokens from ``start`` to ``stop``."""
        return [
            x if place is None else place.part(x, start, stop)
            for x, place in zip(operands, self.operands, strict=True)
        ]

    def run(self, what: str, parts: Sequence[Tensor], tokens: int) -> Sequence[Tensor | Product]:
        compiled = self.compiled.get((what, tokens))
        if compiled is None:
            raise RingfxError(
                f"a region in chunks has no program '{what}' for {tokens} tokens. {DEFECT}"
            )
        return compiled(*parts)


_BODIES: dict[str, Body] = {}


def registered(body: Body) -> str:
    """The key by which a program names the body: equal on all ranks, for equal bodies."""
    given = [(tuple(x.shape), x.dtype, x.device) for x in body.given]
    text = f"{body.program.code}{given}{body.operands}{body.results}{body.wanted}"
    key = hashlib.sha256(f"{text}{body.tokens} {body.chunk}".encode()).hexdigest()[:16]
    _BODIES.setdefault(key, body)
    return key


def body_of(key: str) -> Body:
    """The body of a key.

    Raises
    ------
    RingfxError
        The key comes from another process.
    """
    found = _BODIES.get(key)
    if found is None:
        raise RingfxError(
            f"no region in chunks is known as {key!r}: the program comes from another process. "
            "Do: compile the model in this process."
        )
    return found


@torch.library.custom_op("ringfx::chunked", mutates_args=())
def chunked(operands: list[Tensor], body: str) -> list[Tensor]:
    """The results of a region over all of the rank's tokens."""
    region = body_of(body)
    totals, given = _Totals(region.results), region.begun(operands)
    with _plain_arithmetic(operands[0]):
        for start, stop in region.chunks():
            parts = region.part(given, start, stop)
            totals.add(region.run("forward", parts, stop - start), start, region.tokens)
    return totals.taken([x.dtype for x in region.values])


@chunked.register_fake
def _(operands: list[Tensor], body: str) -> list[Tensor]:
    return _results_like(body_of(body), operands)


@torch.library.custom_op("ringfx::chunked_backward", mutates_args=())
def chunked_backward(grads: list[Tensor], operands: list[Tensor], body: str) -> list[Tensor]:
    """Gradients of the operands in ``Body.wanted``."""
    region = body_of(body)
    totals = _Totals([region.operands[i] for i in region.wanted])
    given = region.begun(operands)
    with _plain_arithmetic(operands[0]):
        for start, stop in region.chunks():
            parts = region.part(given, start, stop)
            parts += [
                g if place is None else place.part(g, start, stop)
                for g, place in zip(grads, region.results, strict=True)
            ]
            totals.add(region.run("backward", parts, stop - start), start, region.tokens)
    return totals.taken([operands[i].dtype for i in region.wanted])


@chunked_backward.register_fake
def _(grads: list[Tensor], operands: list[Tensor], body: str) -> list[Tensor]:
    return [operands[i].new_empty(operands[i].shape) for i in body_of(body).wanted]


@torch.library.custom_op("ringfx::chunked_loss", mutates_args=())
def chunked_loss(operands: list[Tensor], body: str) -> list[Tensor]:
    """The sum that the region ends in, and its gradients to the operands in ``Body.wanted``."""
    region = body_of(body)
    totals = _Totals([None, *(region.operands[i] for i in region.wanted)])
    given = region.begun(operands)
    with _plain_arithmetic(operands[0]):
        for start, stop in region.chunks():
            parts = region.part(given, start, stop)
            totals.add(region.run("loss", parts, stop - start), start, region.tokens)
    (value,) = region.values
    return totals.taken([value.dtype, *(None for _ in region.wanted)])


@chunked_loss.register_fake
def _(operands: list[Tensor], body: str) -> list[Tensor]:
    region = body_of(body)
    (total,) = _results_like(region, operands)
    grads = [
        operands[i].new_empty(operands[i].shape, dtype=_sum_dtype(region.operands[i], operands[i]))
        for i in region.wanted
    ]
    return [total, *grads]


def _plain_arithmetic(x: Tensor) -> torch.autocast:
    """The program says every cast: autocast would add others, in backward too."""
    return torch.autocast(x.device.type, enabled=False)


class _Totals:
    """Results of all chunks: tokens side by side, or sums."""

    def __init__(self, places: Sequence[TokenPlace | None]) -> None:
        self._places = places
        self._found: list[Tensor] = []

    def add(self, parts: Sequence[Tensor | Product], start: int, tokens: int) -> None:
        """``tokens``: of all chunks."""
        is_first = not self._found
        if is_first:
            self._found = [
                _first_sum(x) if place is None or isinstance(x, Product) else place.empty(x, tokens)
                for x, place in zip(parts, self._places, strict=True)
            ]
        for total, x, place in zip(self._found, parts, self._places, strict=True):
            if isinstance(x, Product):
                if not is_first:
                    total.addmm_(x.left, x.right)
            elif place is not None:
                place.write(total, start, x)
            elif not is_first:
                total.add_(x)

    def taken(self, dtypes: Sequence[torch.dtype | None]) -> list[Tensor]:
        return [
            x if dtype is None else x.to(dtype)
            for x, dtype in zip(self._found, dtypes, strict=True)
        ]


def _first_sum(x: Tensor | Product) -> Tensor:
    if isinstance(x, Product):
        return x.left @ x.right
    dtype = _sum_dtype(None, x)
    return x.to(dtype, copy=True) if dtype != x.dtype else x.clone()


def _sum_dtype(place: TokenPlace | None, x: Tensor) -> torch.dtype:
    """In which a sum over chunks is taken; of tokens side by side there is none."""
    narrow = place is None and x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow else x.dtype


def _results_like(body: Body, operands: Sequence[Tensor]) -> list[Tensor]:
    return [operands[0].new_empty(x.shape, dtype=x.dtype, device=x.device) for x in body.values]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, ctx.body = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, None]:
    region, operands = body_of(ctx.body), ctx.saved_tensors
    empty = _results_like(region, operands)
    given = [
        torch.zeros_like(x) if g is None else g.contiguous()
        for g, x in zip(grads, empty, strict=True)
    ]
    found = torch.ops.ringfx.chunked_backward(given, list(operands), ctx.body)
    return _at_wanted(region, len(operands), found), None


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, ctx.body = inputs
    ctx.num_operands = len(operands)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward_of_loss(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, None]:
    grad = grads[0]
    assert grad is not None, "the loss's gradient is what backward begins with"
    region = body_of(ctx.body)
    # Plain operators, not one of ours: Inductor writes the results over what was saved.
    found = [
        once_differentiable((x * grad).to(region.given[i].dtype))
        for i, x in zip(region.wanted, ctx.saved_tensors, strict=True)
    ]
    return _at_wanted(region, ctx.num_operands, found), None


def _at_wanted(body: Body, num: int, found: Sequence[Tensor]) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * num
    for i, gradient in zip(body.wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


register_autograd(chunked, _backward, setup_context=_save)
register_autograd(chunked_loss, _backward_of_loss, setup_context=_save_loss)
refuse_double_backward(chunked_backward)
