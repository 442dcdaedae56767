"""The exact choice under one memory budget: a multiple-choice problem solved by HiGHS.

Equal layers are counted, not listed: 80 equal layers are one row of integer variables. With
n(g, s) the number of layers of group g under strategy s, u(g, s) whether there is any, W the
workspace that all share:

    minimise    sum n(g, s) t(g, s)
    subject to  sum over s of n(g, s) = size of g
                sum n(g, s) m(g, s) + W <= room
                W >= w(g, s) u(g, s),   n(g, s) <= size(g) u(g, s)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from ringfx.cost_model.prediction.predict import Prediction

__all__ = ["Menu", "assign", "peak", "smallest"]

SOLVER_MARGIN = 1e-6
"""HiGHS meets constraints to 1e-7 of their scale; the room is shrunk by more than that."""

Menu: TypeAlias = tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers with the same menu of options, by their positions."""

    menu: Menu
    members: tuple[int, ...]


def assign(menus: Sequence[Menu], room: int | None) -> tuple[int, ...] | None:
    """For each layer the index of its option in the fastest plan that fits; None if none does.

    Parameters
    ----------
    menus
        The options of each layer, fastest first.
    room
        Bytes for saved tensors and workspace of all attention; None: no limit.
    """
    fastest = tuple(0 for _ in menus)
    if room is None or peak(menus, fastest) <= room:
        return fastest
    least = smallest(menus)
    if peak(menus, least) > room:
        return None
    solved = _solve(menus, room)
    # Only where the room is met to within the solver's margin can its answer miss or overshoot.
    return solved if solved is not None and peak(menus, solved) <= room else least


def peak(menus: Sequence[Menu], picked: Sequence[int]) -> int:
    """Bytes of one assignment: everything saved, and the largest workspace."""
    options = [menu[i] for menu, i in zip(menus, picked, strict=True)]
    workspace = max((option.workspace_bytes for option in options), default=0)
    return sum(option.saved_bytes for option in options) + workspace


def smallest(menus: Sequence[Menu]) -> tuple[int, ...]:
    """The assignment that needs least: exact, without a solver.

    For each bound on the workspace every layer takes the least saved bytes within it; the least
    over all bounds that occur is the least of all.
    """
    groups = _groups(menus)
    bounds = sorted({option.workspace_bytes for group in groups for option in group.menu})
    plans = [plan for bound in bounds if (plan := _least_saved(groups, bound)) is not None]
    return min(plans, key=lambda plan: peak(menus, plan), default=())


def _least_saved(groups: Sequence[Group], bound: int) -> tuple[int, ...] | None:
    picked: dict[int, int] = {}
    for group in groups:
        within = [i for i, option in enumerate(group.menu) if option.workspace_bytes <= bound]
        if not within:
            return None
        best = min(within, key=lambda i: (group.menu[i].saved_bytes, i))
        picked |= dict.fromkeys(group.members, best)
    return tuple(picked[layer] for layer in range(len(picked)))


def _solve(menus: Sequence[Menu], room: int) -> tuple[int, ...] | None:
    groups = _groups(menus)
    return _spread(groups, _counts(groups, room), len(menus))


def _groups(menus: Sequence[Menu]) -> tuple[Group, ...]:
    members: dict[Menu, list[int]] = {}
    for position, menu in enumerate(menus):
        members.setdefault(menu, []).append(position)
    return tuple(Group(menu=menu, members=tuple(where)) for menu, where in members.items())


def _counts(groups: Sequence[Group], room: int) -> NDArray[np.int64] | None:
    """n(g, s) for all groups' options in one row; None if HiGHS finds no solution."""
    size = np.repeat([len(g.members) for g in groups], [len(g.menu) for g in groups])
    options = [option for group in groups for option in group.menu]
    time = np.array([option.cost_ms for option in options])
    saved = np.array([option.saved_bytes for option in options]) / room
    workspace = np.array([option.workspace_bytes for option in options]) / room
    num = len(options)
    zero, one = np.zeros((num, num)), np.eye(num)
    column = np.ones((num, 1))
    result = milp(
        c=np.concatenate([time / time.max(), np.zeros(num + 1)]),
        integrality=np.concatenate([np.ones(2 * num), [0]]),
        bounds=Bounds(0, np.concatenate([size, np.ones(num), [1.0]])),
        constraints=[
            _one_option_each(groups, num),
            LinearConstraint(np.concatenate([saved, np.zeros(num), [1.0]]), ub=1 - SOLVER_MARGIN),
            LinearConstraint(np.hstack([zero, -np.diag(workspace), column]), lb=0),
            LinearConstraint(np.hstack([one, -np.diag(size), 0 * column]), ub=0),
        ],
        options={"mip_rel_gap": 0.0},
    )
    return None if result.x is None else np.rint(result.x[:num]).astype(np.int64)


def _one_option_each(groups: Sequence[Group], num: int) -> LinearConstraint:
    rows = np.zeros((len(groups), 2 * num + 1))
    start = 0
    for row, group in zip(rows, groups, strict=True):
        row[start : start + len(group.menu)] = 1
        start += len(group.menu)
    sizes = [len(group.members) for group in groups]
    return LinearConstraint(rows, lb=sizes, ub=sizes)


def _spread(
    groups: Sequence[Group], counts: NDArray[np.int64] | None, num_layers: int
) -> tuple[int, ...] | None:
    """Counts back to layers: the last members of a group take its faster options, since backward
    is done with what they keep when it computes others again."""
    if counts is None:
        return None
    picked = [0] * num_layers
    start = 0
    for group in groups:
        own = counts[start : start + len(group.menu)]
        start += len(group.menu)
        indices = np.repeat(np.arange(len(own)), own)[::-1]
        for position, index in zip(group.members, indices, strict=True):
            picked[position] = int(index)
    return tuple(picked)
