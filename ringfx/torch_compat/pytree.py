"""Nested arguments and results as flat lists.

torch has no public door to these yet; what torch.compile, torch.func and torch.export flatten with
must be what ringfx flattens with, or leaves are counted differently. Without: every call with
nested arguments, split tensors and offline plans.
"""

from __future__ import annotations

import torch.utils._pytree as pytree

__all__ = [
    "TreeSpec", "keystr", "tree_flatten", "tree_leaves", "tree_leaves_with_path",
    "tree_map", "tree_map_with_path", "tree_unflatten",
]  # fmt: skip

TreeSpec = pytree.TreeSpec
keystr = pytree.keystr
tree_flatten = pytree.tree_flatten
tree_leaves = pytree.tree_leaves
tree_leaves_with_path = pytree.tree_leaves_with_path
tree_map = pytree.tree_map
tree_map_with_path = pytree.tree_map_with_path
tree_unflatten = pytree.tree_unflatten
