"""A table that a model keeps on another device is moved whole: no rank picks its tokens there.

``tests/device/dry_run.py`` runs whole models of this kind (VideoMAE) on fake CUDA tensors.
"""

from __future__ import annotations

import torch

from ringfx.passes.place.min_cut import _reading_elsewhere, home_device

aten = torch.ops.aten
HOME, AWAY = torch.device("cpu"), torch.device("meta")


def test_home_is_where_most_tensors_are_and_numbers_do_not_count() -> None:
    numbers = [torch.empty((), device=AWAY) for _ in range(9)]
    tensors = [torch.empty(2, device=AWAY), torch.empty(2), torch.empty(3)]
    assert home_device([*tensors, *numbers, None, 3]) == HOME
    assert home_device([torch.empty(2, device=AWAY)]) == AWAY
    assert home_device([]) == HOME


def test_only_what_reads_a_tensor_elsewhere_is_kept_whole() -> None:
    graph = torch.fx.Graph()
    x, table, number = (graph.placeholder(name) for name in ("x", "table", "number"))
    moved = graph.call_function(aten.to.device, (table, HOME, torch.float32))
    total = graph.call_function(aten.add.Tensor, (x, moved))
    scaled = graph.call_function(aten.mul.Tensor, (total, number))
    for node in (x, moved, total, scaled):
        node.meta["val"] = torch.empty(4)
    table.meta["val"], number.meta["val"] = (
        torch.empty(4, device=AWAY),
        torch.empty((), device=AWAY),
    )
    assert _reading_elsewhere(graph, HOME) == {moved}
