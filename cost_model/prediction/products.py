"""Products by the shapes of what they multiply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch.fx import Node

from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["op_name", "product_flops"]


def op_name(node: Node) -> str:
    """``aten.mul.Tensor`` -> ``mul``."""
    target = node.target
    if isinstance(target, OpOverload):
        return _name_of(target)
    return getattr(target, "__name__", str(target))


@lru_cache(maxsize=4096)
def _name_of(target: OpOverload) -> str:
    return str(schema_of(target).name).split("::")[1]


def product_flops(node: Node) -> float:
    """Multiplications and additions of a product over whole tensors; 0 for what is none."""
    result = node.meta.get("val")
    if node.op != "call_function" or not isinstance(result, torch.Tensor):
        return 0.0
    name = op_name(node)
    if name == "einsum":
        return 2.0 * _indices(node)
    if name == "transposed_convolution":
        given, weight, *_ = _shapes(node)
        return 2.0 * math.prod(given) * math.prod(weight[1:])
    if name in CONTRACTED:
        return 2.0 * result.numel() * CONTRACTED[name](_shapes(node))
    return 0.0


Shapes = Sequence[Sequence[int]]


def _shapes(node: Node) -> Shapes:
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return [v.shape for v in values if isinstance(v, torch.Tensor) and v.dim()]


def _last(shapes: Shapes) -> int:
    return shapes[0][-1]


def _last_of_second(shapes: Shapes) -> int:
    return shapes[1][-1]


def _window(shapes: Shapes) -> int:
    """Of a convolution: elements of the kernel that one output reads."""
    return math.prod(shapes[1][1:])


CONTRACTED: Mapping[str, Callable[[Shapes], int]] = {
    # products that one element of the result is a sum of
    "linear": _last, "mm": _last, "bmm": _last, "matmul": _last,
    "grouped_mm": _last, "_grouped_mm": _last,
    "addmm": _last_of_second, "baddbmm": _last_of_second,
    "convolution": _window, "conv1d": _window, "conv2d": _window, "conv3d": _window,
}  # fmt: skip


def _indices(node: Node) -> float:
    """The number of combinations of an einsum's indices."""
    equation = str(node.args[0]).replace(" ", "").partition("->")[0]
    sizes: dict[str, int] = {}
    for letters, shape in zip(equation.split(","), _shapes(node), strict=False):
        plain = letters.replace("...", "")
        named = [*plain] if "..." not in letters else _with_rest(letters, len(shape))
        sizes.update(zip(named, shape, strict=False))
    return math.prod(sizes.values())


def _with_rest(letters: str, dims: int) -> Iterable[str]:
    before, _, after = letters.partition("...")
    rest = [f"...{i}" for i in reversed(range(dims - len(before) - len(after)))]
    return [*before, *rest, *after]
