"""A rank's part of a value that is computed when it is touched: logits that nobody may read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringfx.comm.conjugate import take_tokens
from ringfx.errors import DeferredLost
from ringfx.ops.chunked import Body
from ringfx.passes.capture.precision import autocast_off
from ringfx.torch_compat.autograd import version_of
from ringfx.units.argument import Argument

__all__ = ["Deferred"]


class Deferred:
    """The part as a region of the program and its operands, which are kept for backward anyway."""

    def __init__(
        self, body: Body, operands: Sequence[torch.Tensor], name: str, dtype: torch.dtype
    ) -> None:
        self.body = body
        self.name = name
        self.dtype = dtype
        self.device = body.values[0].device
        self._operands = [x.detach() for x in operands]
        self._versions = [None if x.is_inference() else version_of(x) for x in self._operands]

    def to(self, dtype: torch.dtype) -> Deferred:
        """The same part, in another type."""
        return Deferred(self.body, self.operands(), self.name, dtype)

    def part(self) -> torch.Tensor:
        """All of the rank's tokens.

        Raises
        ------
        DeferredLost
            An operand was written or freed since.
        """
        return self._run(self.operands())

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Some of the rank's tokens by number, int64."""
        places = self.body.operands
        return self._run(
            [
                x if p is None else take_tokens(x, tokens, p.dim, p.outer, p.inner)
                for x, p in zip(self.operands(), places, strict=True)
            ]
        )

    def operands(self) -> Sequence[torch.Tensor]:
        """What it is computed from, as long as that is what it was."""
        for x, version in zip(self._operands, self._versions, strict=True):
            is_written = version is not None and version_of(x) != version
            if is_written or x.untyped_storage().nbytes() < x.numel() * x.element_size():
                raise DeferredLost(
                    f"{self.name}: this output is computed when it is first used, and an operand "
                    f"of it {tuple(x.shape)} was {'written' if is_written else 'freed'} before "
                    "(by optimizer.step(), for example). Do: use the output before, or pass "
                    f"{Argument('chunks', 'none')} to compute it with the model."
                )
        return self._operands

    def _run(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), autocast_off():  # the program says every cast
            (result,) = self.body.program(*operands)
            return result.to(self.dtype)  # type: ignore[no-any-return]
