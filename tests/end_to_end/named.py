"""Models whose modules, parameters, buffers and arguments have names that code cannot say."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["NAMES", "WAYS", "ByKeyword", "Named", "keywords", "states"]

Tensor = torch.Tensor
WIDTH = 4

NAMES = (
    *keyword.kwlist, *keyword.softkwlist,
    "input", "print", "len", "range", "type", "str", "id", "map", "sum", "object", "cls", "torch",
    "aten", "ops", "math", "fx", "device", "inf", "nan", "NoneType", "forward", "graph", "code",
    "args", "kwargs", "getattr", "output", "placeholder", "L", "G", "L_self_", "arg0_1", "add",
    "add_1", "__", "_x", "0", "1a", "a b", "a-b", "a/b", "a'b", 'a"b', "a\\b", "a\nb", "a[0]",
    "a['b']", "a]", "[", "(", "#", "%s", "{}", "{a}", "$", "é", "变量", "ﬁ", "\U0001d518", "\u200b",
    "\U0001f600", "_modules", "_parameters", "weight", "ringfx", "rank", "valid", "tokens",
)  # fmt: skip


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)


class Leaf(nn.Module):
    """A parameter, a buffer and an entry of a ParameterDict, named alike."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.given = nn.ParameterDict({f"{name} given": torch.randn(WIDTH)})
        self._parameters[name] = nn.Parameter(torch.randn(WIDTH))
        self._buffers[f"{name} kept"] = torch.randn(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept, weight = self._buffers[f"{self.name} kept"], self._parameters[self.name]
        assert kept is not None
        assert weight is not None
        return torch.tanh(x * weight * self.given[f"{self.name} given"] + kept)


def _added(inner: nn.Module, name: str) -> None:
    inner.add_module(name, Leaf(name))


def _below(inner: nn.Module, name: str) -> None:
    """Dots in the name of one module, which add_module refuses and setattr does not."""
    setattr(inner, f"{name}.{name}", Leaf(name))


WAYS: Mapping[str, Callable[[nn.Module, str], None]] = {
    "add_module": _added, "with dots": _below,
}  # fmt: skip


class Named(nn.Module):
    """Leaves of all names, and an attention below each of some."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner = nn.Module()
        for name in NAMES:
            if way != "add_module" or not hasattr(self.inner, name):  # it refuses methods' names
                WAYS[way](self.inner, name)
        for name in ("class", "a b", "é", "None"):
            self.inner._modules[f"{name} attends"] = Attend()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner._modules.values():
            assert layer is not None
            x = x + layer(x)
        return x


class ByKeyword(nn.Module):
    """Takes any arguments by name and gives results by the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.attend = Attend()

    def forward(self, **given: Tensor) -> Mapping[str, Any]:
        x = torch.stack([y * (i + 1) for i, y in enumerate(given.values())]).mean(0) / len(given)
        y = self.attend(x * self.scale)
        return {name: y * value for name, value in given.items()}


def states() -> tuple[Tensor]:
    return (torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_(),)


def keywords() -> dict[str, Tensor]:
    (x,) = states()
    return {name: x.detach() + i / 100 for i, name in enumerate(NAMES)}
