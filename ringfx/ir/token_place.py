"""Where a tensor has its tokens: one dimension, which is [outer, tokens, inner]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["TokenPlace"]


@dataclass(frozen=True, kw_only=True)
class TokenPlace:
    """Dimension ``dim`` of a tensor, opened as [outer, tokens, inner]."""

    dim: int
    outer: int
    inner: int

    def tokens(self, x: torch.Tensor) -> int:
        return int(x.shape[self.dim]) // (self.outer * self.inner)

    def part(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The tokens from ``start`` to ``stop``, contiguous."""
        shape = x.shape
        taken = self._opened(x).narrow(self.dim + 1, start, stop - start)
        size = self.outer * (stop - start) * self.inner
        return taken.reshape(*shape[: self.dim], size, *shape[self.dim + 1 :]).contiguous()

    def empty(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """As x, but of so many tokens."""
        return x.new_empty(self.shape(x, tokens))

    def shape(self, x: torch.Tensor, tokens: int) -> list[int]:
        """That of x, but of so many tokens."""
        shape = list(x.shape)
        shape[self.dim] = self.outer * tokens * self.inner
        return shape

    def write(self, whole: torch.Tensor, start: int, x: torch.Tensor) -> None:
        """Put the tokens of x into a contiguous tensor, from number ``start`` on."""
        place = self._opened(whole).narrow(self.dim + 1, start, self.tokens(x))
        place.copy_(self._opened(x))

    def _opened(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        opened = (self.outer, self.tokens(x), self.inner)
        return x.reshape(*shape[: self.dim], *opened, *shape[self.dim + 1 :])
