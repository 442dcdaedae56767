"""What an optimizer keeps for each trained parameter."""

from __future__ import annotations

from collections.abc import Mapping

from ringfx.errors import InvalidArgument
from ringfx.units.argument import Argument

__all__ = ["OPTIMIZERS", "check_optimizer", "state_bytes"]

OPTIMIZERS: Mapping[str, int] = {
    # tensors as large as the parameter, in its dtype, as torch.optim makes them
    "adam": 2,
    "adamw": 2,
    "amsgrad": 3,
    "lion": 1,
    "momentum": 1,
    "sgd": 0,
    "none": 0,
}
"""``momentum`` is SGD with momentum; ``none`` leaves the state out and the plan says so."""


MOST_STATE = 2**16
"""Bytes for each parameter; optimizers keep some dozens."""


def check_optimizer(name: str | int) -> None:
    """Raises InvalidArgument for what is neither a name nor bytes a parameter."""
    if isinstance(name, str) and name in OPTIMIZERS:
        return
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name <= MOST_STATE:
        return
    raise InvalidArgument(
        f"unknown optimizer {name!r}. Do: use one of {', '.join(OPTIMIZERS)}, or give its bytes of "
        f"state for each parameter, such as {Argument('optimizer', 12)}."
    )


def state_bytes(optimizer: str | int, numel: int, itemsize: int) -> int:
    """State of one parameter.

    >>> state_bytes("adamw", 1000, 4), state_bytes("sgd", 1000, 4), state_bytes(12, 1000, 2)
    (8000, 0, 12000)
    """
    if isinstance(optimizer, str):
        return OPTIMIZERS[optimizer] * numel * itemsize
    return optimizer * numel
