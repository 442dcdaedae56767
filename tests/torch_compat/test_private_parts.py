"""What torch may change without notice is named in ringfx/torch_compat, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_rooms import ROOT, sources

OURS = ("_ringfx",)
"""Beginnings of names that ringfx sets on objects of others."""

OTHERS = {
    "_getframe": "sys: CPython's own, kept for compatibility",
    "_current_frames": "sys: documented by Python",
    "_exit": "os: documented by Python",
    "_exit_function": "multiprocessing.util: what a process that ends by _exit leaves out",
    "_reconstructor": "copyreg: the default of pickling, kept for old pickles",
    "_from_config": "transformers: what AutoModel.from_config calls",
    "_model_mapping": "transformers: the table behind AutoModel",
    "_dataloaders": "accelerate: what it has prepared, which its ends and its states go through",
    "_models": "accelerate: the same",
    "_ddp_kwargs": "lightning: what its DDPStrategy was made with",
    "_register_ddp_hooks": "lightning: the communication hooks of its DDPStrategy",
    "_bias": "xformers: the fields of its mask classes have no public names",
    "_window_size": "xformers: the same",
}
"""Private names of libraries other than torch."""


def test_only_torch_compat_names_private_parts_of_torch() -> None:
    files = (path for path in sources() if "torch_compat" not in path.parts)
    trees = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in files}
    defined = {name for tree in trees.values() for name in definitions(tree)}
    found = [
        f"{path}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in private_parts(tree, defined)
    ]
    assert not found


def private_parts(tree: ast.Module, defined: set[str]) -> Iterator[tuple[int, str]]:
    """Imports of private names of torch, and private attributes that ringfx does not define.

    Operators count as public, whatever their names: ``aten._softmax`` stands in programs.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, x.name) for x in node.names if is_private(x.name))
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{x.name}" for x in node.names)
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_hidden(node.attr):
            known = node.attr in defined | OTHERS.keys() or node.attr.startswith(OURS)
            if not known and not is_operators(ast.unparse(node.value)):
                yield node.lineno, ast.unparse(node)


def is_private(module: str) -> bool:
    first, *rest = module.split(".")
    return first == "torch" and any(map(is_hidden, rest))


def is_hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_operators(text: str) -> bool:
    return text == "aten" or text.startswith("torch.ops.")


def definitions(tree: ast.Module) -> Iterator[str]:
    """Hidden names of functions, classes, fields and attributes that this file makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch._ops import OpOverload", ["torch._ops.OpOverload"]),
        ("from torch.utils import _pytree", ["torch.utils._pytree"]),
        ("torch._C._functorch.depth()", ["torch._C", "torch._C._functorch"]),
        ("node.target._schema.arguments", ["node.target._schema"]),
        ("torch.ops.aten._softmax, aten._softmax", []),
        ("self._local", []),
        ("torch.__version__", []),
    ],
)
def test_a_private_part_is_seen(text: str, found: list[str]) -> None:
    assert sorted(name for _, name in private_parts(ast.parse(text), {"_local"})) == found


def test_every_name_of_torch_compat_says_what_it_is_for() -> None:
    """In a docstring of its own, or in its module's where that speaks of all."""
    silent = [
        f"{path.name}: {name}"
        for path in sorted(Path(ROOT, "torch_compat").glob("*.py"))
        for name in undocumented(ast.parse(path.read_text()))
    ]
    assert not silent


def undocumented(tree: ast.Module) -> Iterator[str]:
    if "Without" in (ast.get_docstring(tree) or "").replace('"Without"', ""):
        return
    names = exported(tree)
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            text: object = ast.get_docstring(node)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        else:
            continue
        if not text:
            yield ast.unparse(node).split("\n")[0]


def exported(tree: ast.Module) -> set[str]:
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return {name for names in lists for name in names}
