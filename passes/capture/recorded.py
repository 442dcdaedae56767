"""Functions that tracing leaves as one call of the flat program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)

from ringfx.torch_compat.pytree import tree_map

__all__ = ["Recorded", "as_one_call"]


def as_one_call(target: Any, run: Callable[..., Any], operands: Sequence[Any], name: str) -> Any:
    """Calls ``run``; while the flat program is traced, records it as one call of ``target``."""
    mode = get_proxy_mode()
    if mode is None or not getattr(mode, "pre_dispatch", False):
        return run(*operands)
    tracer = cast(Any, mode.tracer)
    proxies = tree_map(tracer.unwrap_proxy, operands)
    proxy = tracer.create_proxy("call_function", target, proxies, {}, name=name)
    with disable_proxy_modes_tracing():
        results = run(*operands)
    return track_tensor_tree(results, proxy, constant=None, tracer=tracer)


class Recorded:
    """A function with a backward of its own, which tracing would otherwise look into and lose.

    Called while the flat program is traced it records itself as one call; called later (run, or
    traced by the compiler's autograd) it is the function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        # torch.fx names a call by these, and ranks compare programs by those names.
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__

    def __repr__(self) -> str:
        return self.__name__

    def __call__(self, *operands: Any) -> Any:
        return as_one_call(self, self.function, operands, self.__name__)
