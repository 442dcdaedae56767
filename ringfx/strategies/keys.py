"""The text by which a program names its strategies.

An operator of torch.library takes no objects, and a program may outlive the model that it was made
of. So each strategy that a program is made with has a key for as long as the process lives: equal
strategies the same, others another, whatever their names.
"""

from __future__ import annotations

import threading

from ringfx.errors import InvalidArgument
from ringfx.strategies import STRATEGIES, Strategy, planned_with

__all__ = ["key_of", "strategy_of"]

_OWN = planned_with(STRATEGIES)
_OTHERS: dict[str, Strategy] = {}
"""Strategies of users, by key: those of programs of this process."""
_LOCK = threading.Lock()


def key_of(strategy: Strategy) -> str:
    """The name of ringfx's own strategies; of others the name and a number, as ``mine#1``."""
    if _OWN.get(strategy.name) == strategy:
        return strategy.name
    with _LOCK:
        for key, known in _OTHERS.items():
            if known == strategy:
                return key
        number = 1 + sum(known.name == strategy.name for known in _OTHERS.values())
        key = f"{strategy.name}#{number}"
        _OTHERS[key] = strategy
    return key


def strategy_of(key: str, where: str) -> Strategy:
    """The strategy of a key.

    Raises
    ------
    InvalidArgument
        There is none: the text comes from another process, or was never one.
    """
    found = _OWN.get(key) or _OTHERS.get(key)
    if found is None:
        names = ", ".join(STRATEGIES)
        raise InvalidArgument(
            f"{where or 'attention'}: no strategy is named {key!r}. Do: use {names}."
        )
    return found
