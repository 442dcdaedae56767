"""Every error of ringfx with the texts that it is raised with, read from the source.

Nothing is imported: classes come from ``ringfx/errors.py`` (their docstrings hold cause and cure),
texts from wherever one of these classes is called, through the functions that build a text.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

__all__ = ["ROOT", "ErrorClass", "Message", "Source", "catalogue"]

ROOT = Path(__file__).parents[2]
FOLDERS = ("ringfx", "passes", "cost_model")
MOST = 6
"""Forms of one text that are told apart; where there are more, the part that varies is named."""
DEEPEST = 6
"""Calls and names that are followed."""
DO = re.compile(r"\bDo(?:: | one of these:\s*)")
REMEDY = "{what writes such a file}"
PASSED_ON = {
    "ringfx/comparison/report.py": "The report of `ringfx.verify`, which names what differs first.",
    "ringfx/ops/checks.py": "{layer}: a reason of StrategyRefused, below, and what to do.",
    "ringfx/validation/json_reader.py": "What a file holds cannot be used; the texts are below.",
    "cost_model/calibration/shared_profile.py": "Rank 0's error, on all ranks.",
}
"""Files that raise a text that was made elsewhere: what it is."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One text with the names of its values in braces."""

    text: str
    places: tuple[str, ...]
    """File and line of each call that makes it."""

    @property
    def file(self) -> str:
        """The first of them."""
        return self.places[0].split(":")[0]

    @property
    def what(self) -> str:
        """What happened: the text up to what to do."""
        return DO.split(self.text)[0].strip()

    @property
    def cure(self) -> str:
        """What the text says to do; empty where it was made elsewhere (``PASSED_ON``)."""
        _, *rest = DO.split(self.text, maxsplit=1)
        return rest[0].strip() if rest else ""

    @property
    def is_readable(self) -> bool:
        """Whether words of the text stand here, and not only names of values."""
        return _words(self.text) >= 2


@dataclass(frozen=True, kw_only=True)
class ErrorClass:
    """A class of ``ringfx/errors.py``."""

    name: str
    base: str
    summary: str
    cause: str
    cure: str
    messages: Sequence[Message] = ()


@dataclass(frozen=True)
class Source:
    """One file: what its names stand for."""

    path: Path
    root: Path = ROOT

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text())

    @cached_property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @cached_property
    def functions(self) -> Mapping[str, ast.FunctionDef]:
        return {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)}

    @cached_property
    def constants(self) -> Mapping[str, ast.expr]:
        return dict(_assigned(self.tree.body))

    @cached_property
    def imports(self) -> Mapping[str, tuple[Path, str]]:
        """Where a name that comes from ringfx is defined."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ringfx"):
                path = self.root.joinpath(*str(node.module).split(".")).with_suffix(".py")
                for alias in node.names:
                    found[alias.asname or alias.name] = (path, alias.name)
        return found

    def calls(self) -> Iterator[tuple[ast.Call, Scope]]:
        """Every call, with the function that it stands in."""
        scopes: list[tuple[ast.AST, Scope]] = [(self.tree, Scope(self))]
        while scopes:
            node, scope = scopes.pop()
            for child in ast.iter_child_nodes(node):
                inner = scope
                if isinstance(child, ast.FunctionDef):
                    inner = Scope(self, child)
                elif isinstance(child, ast.Call):
                    yield child, scope
                scopes.append((child, inner))


@dataclass(frozen=True)
class Scope:
    """Where an expression stands."""

    source: Source
    function: ast.FunctionDef | None = None
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Texts that a caller passes."""

    @cached_property
    def local(self) -> Mapping[str, list[ast.expr]]:
        """What is assigned to each name inside the function."""
        found: dict[str, list[ast.expr]] = {}
        for name, value in _assigned(ast.walk(self.function) if self.function else ()):
            found.setdefault(name, []).append(value)
        return found

    @cached_property
    def parameters(self) -> Mapping[str, ast.expr | None]:
        """With their defaults."""
        if self.function is None:
            return {}
        a = self.function.args
        plain = [*a.posonlyargs, *a.args]
        defaults = [None] * (len(plain) - len(a.defaults)) + [*a.defaults]
        return {
            **{p.arg: d for p, d in zip(plain, defaults, strict=True)},
            **{p.arg: d for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)},
        }

    def annotation(self, name: str) -> str:
        a = self.function.args if self.function else None
        of = {p.arg: p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)} if a else {}
        found = of[name].annotation if name in of else None
        return ast.unparse(found) if found else ""


@cache
def catalogue(root: Path = ROOT) -> Sequence[ErrorClass]:
    """The classes in their order, each with its messages in the order of files.

    Raises
    ------
    ValueError
        A class has no cause or no cure, or no word of a message can be read from the source.
    """
    classes = _classes(Source(root / "ringfx" / "errors.py", root))
    messages: dict[str, dict[str, Message]] = {name: {} for name in classes}
    bases = {name: name for name in classes}
    sources = [_source(path, root) for path in _files(root)]
    for source in sources:
        bases |= _subclasses(source, bases)
    for source in sources:
        for call, scope in source.calls():
            name = _class_called(call, scope, bases)
            for text in _messages(call, scope) if name else ():
                place = f"{source.name}:{call.lineno}"
                known = messages[str(name)].get(text)
                places = (*known.places, place) if known else (place,)
                messages[str(name)][text] = Message(text=text, places=places)
    unread = [m for of in messages.values() for m in of.values() if not m.is_readable]
    if unread:
        listed = "\n".join(f"  {m.places[0]}: {m.text}" for m in unread)
        raise ValueError(f"the text of these errors cannot be read from the source:\n{listed}")
    return [
        ErrorClass(**about, messages=tuple(messages[name].values()))
        for name, about in classes.items()
    ]


def _files(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            inside = path.relative_to(root).parts[:-1]
            if not any((root / Path(*inside[: n + 1])).is_symlink() for n in range(len(inside))):
                yield path


def _classes(source: Source) -> dict[str, dict[str, str]]:
    found = {}
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef) and node.bases:  # the others are what errors carry
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            parts = {p.partition(":")[0]: " ".join(p.partition(":")[2].split()) for p in paragraphs}
            for part in ("Cause", "Cure"):
                if not parts.get(part):
                    raise ValueError(f'ringfx/errors.py: {node.name} has no "{part}:" paragraph')
            found[node.name] = {
                "name": node.name,
                "base": ast.unparse(node.bases[0]),
                "summary": " ".join(paragraphs[0].split()),
                "cause": parts["Cause"],
                "cure": parts["Cure"],
            }
    return found


def _subclasses(source: Source, bases: Mapping[str, str]) -> dict[str, str]:
    """Classes of other files, by the class of ``errors.py`` that they are."""
    return {
        node.name: bases[base.id]
        for node in source.tree.body
        if isinstance(node, ast.ClassDef) and node.name not in bases
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in bases
    }


def _class_called(call: ast.Call, scope: Scope, bases: Mapping[str, str]) -> str | None:
    """The class whose error a call makes, also where it is a parameter or a field ``error``.

    Two calls hand on what will be a text: ``Refusal(reason=, remedy=)`` and ``Source.refuse``.
    """
    if isinstance(call.func, ast.Attribute):
        name = call.func.attr
        if name == "refuse" or ast.unparse(call.func) == "self.error":
            return "RingfxError"
    elif isinstance(call.func, ast.Name):
        name = call.func.id
        if name == "Refusal":
            return "StrategyRefused"
        if scope.annotation(name).startswith("type["):
            default = scope.parameters.get(name)
            name = default.id if isinstance(default, ast.Name) else "RingfxError"
    else:
        return None
    return bases.get(name)


def _messages(call: ast.Call, scope: Scope) -> Iterator[str]:
    named = {k.arg: _texts(k.value, scope, DEEPEST) for k in call.keywords}
    if "reason" in named:
        forms = _joined([["{layer}: "], named["reason"], [". Do: "], named["remedy"], ["."]])
    elif call.args:
        forms = _texts(call.args[0], scope, DEEPEST)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "refuse":
            forms = [f"{{file}}: {form}. Do: {REMEDY}." for form in forms if _words(form)]
    else:
        return
    for form in forms:
        yield form.strip() if _words(form) >= 2 else PASSED_ON.get(scope.source.name, form)


def _words(text: str) -> int:
    """Outside braces."""
    return len(re.findall(r"[A-Za-z]{2,}", re.sub(r"\{[^{}]*\}", "", text)))


# --- the text of an expression --------------------------------------------------------------------


def _texts(node: ast.expr, scope: Scope, depth: int) -> list[str]:
    """The forms of a text; ``{name}`` stands for what only a run knows."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return _joined([_texts(p, scope, depth) for p in parts])
        case ast.Call(func=ast.Name(id="Argument"), args=[ast.Constant(value=str(name)), *given]):
            return [f"{name}={_written(given[0], scope)}" if given else name]
        case ast.FormattedValue(value=ast.Call(func=ast.Name(id="Argument")) as value):
            return _texts(value, scope, depth)
        case ast.FormattedValue(value=value):
            found = _texts(value, scope, depth)
            is_said = any(_words(text) >= 2 for text in found) or isinstance(value, ast.Name)
            return found if is_said else [f"{{{_label(value)}}}"]
        case ast.BinOp(left=left, op=ast.Add(), right=right) if _is_text(node):
            return _joined([_texts(left, scope, depth), _texts(right, scope, depth)])
        case ast.IfExp(body=body, orelse=orelse):
            either = dict.fromkeys(_texts(body, scope, depth) + _texts(orelse, scope, depth))
            return [text for text in either if text] or [""]  # with what is there only sometimes
        case ast.Name(id=name):
            return _of_name(name, scope, depth) or [f"{{{name}}}"]
        case ast.Call():
            return _of_call(node, scope, depth) or [f"{{{_label(node)}}}"]
        case ast.Subscript(value=ast.Name(id=name)) if name in scope.source.constants:
            return _of_table(scope.source.constants[name], scope, depth) or [f"{{{_label(node)}}}"]
        case _:
            return [f"{{{_label(node)}}}"]


def _written(value: ast.expr, scope: Scope) -> str:
    """The value of an ``Argument``, as Python writes it."""
    match value:
        case ast.Constant(value=str(text)):
            return f'"{text}"'
        case ast.Call(func=ast.Name(id="Code"), args=[ast.Constant(value=str(text)), *_]):
            return text.replace("{", "(").replace("}", ")")  # braces are for names of values
        case ast.Constant(value=plain):
            return str(plain)
        case ast.Name(id=name) if name in scope.source.constants:
            return _written(scope.source.constants[name], scope)
    return f"{{{_label(value)}}}"


def _of_name(name: str, scope: Scope, depth: int) -> list[str]:
    if name in scope.given:
        return list(scope.given[name])
    if not depth or name in scope.parameters:
        return []
    values = scope.local.get(name) or [v for n, v in scope.source.constants.items() if n == name]
    if not values and name in scope.source.imports:
        source, name = _home(name, scope.source)
        return _of_name(name, Scope(source), depth - 1)
    texts = [t for v in values if _is_text(v) for t in _texts(v, scope, depth - 1)]
    return _few(texts)


def _of_call(call: ast.Call, scope: Scope, depth: int) -> list[str]:
    """The texts that a function of ringfx returns; of ``format`` the text that is filled."""
    match call.func:
        case ast.Attribute(value=text, attr="format"):
            return _texts(text, scope, depth)
        case ast.Attribute(value=ast.Constant(value=str(between)), attr="join"):
            parts = call.args[0].elts if isinstance(call.args[0], ast.List) else []
            forms = [form for p in parts if (form := _of_part(p, scope, depth))]
            return _joined([x for f in forms for x in ([between], f)][1:]) if forms else []
        case ast.Attribute(value=ast.Name(id=name), attr="get") if name in scope.source.constants:
            found = _of_table(scope.source.constants[name], scope, depth)
            return _few(found + [t for a in call.args[1:] for t in _texts(a, scope, depth)], 99)
        case ast.Name(id=name) if depth:
            return _returned(name, call, scope, depth)
    return []


def _of_part(part: ast.expr, scope: Scope, depth: int) -> list[str]:
    """One text of a list; of ``*lines`` one of them."""
    if not isinstance(part, ast.Starred):
        return _texts(part, scope, depth)
    lists = scope.local.get(part.value.id, []) if isinstance(part.value, ast.Name) else []
    return [t for x in lists if isinstance(x, ast.ListComp) for t in _texts(x.elt, scope, depth)]


def _returned(name: str, call: ast.Call, scope: Scope, depth: int) -> list[str]:
    """The texts of a function of this file, or of one that it imports."""
    source, name = _home(name, scope.source)
    function = source.functions.get(name)
    if function is None or "str" not in ast.unparse(function.returns or ast.Constant("")):
        return []
    inner = Scope(source, function, _passed(call, function, scope, depth))
    texts = [
        text
        for n in ast.walk(function)
        if isinstance(n, ast.Return) and n.value is not None and _is_text(n.value)
        for text in _texts(n.value, inner, depth - 1)
    ]
    return _few(texts, 99)


def _home(name: str, source: Source) -> tuple[Source, str]:
    """The file that defines a name, and what it is called there."""
    path, there = source.imports.get(name, (source.path, name))
    return (_source(path, source.root), there) if path.exists() else (source, name)


@cache
def _source(path: Path, root: Path) -> Source:
    return Source(path, root)


def _passed(
    call: ast.Call, function: ast.FunctionDef, scope: Scope, depth: int
) -> dict[str, list[str]]:
    names = [p.arg for p in (*function.args.posonlyargs, *function.args.args)]
    given = [*zip(names, call.args, strict=False)]
    given += [(k.arg, k.value) for k in call.keywords if k.arg]
    return {name: _texts(value, scope, depth - 1) for name, value in given if _is_text(value)}


def _of_table(node: ast.expr, scope: Scope, depth: int) -> list[str]:
    values = node.values if isinstance(node, ast.Dict) else []
    return _few([t for v in values if _is_text(v) for t in _texts(v, scope, depth)], 99)


def _is_text(node: ast.expr) -> bool:
    """Whether words of the expression can stand in a text."""
    match node:
        case ast.Constant(value=value):
            return isinstance(value, str)
        case ast.JoinedStr() | ast.Call(func=ast.Name()):
            return True
        case ast.Call(func=ast.Attribute(attr="format" | "get" | "join")):
            return True
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _is_text(left) or _is_text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return _is_text(body) or _is_text(orelse)
    return False


def _joined(parts: Sequence[list[str]]) -> list[str]:
    """Every combination, as long as there are few."""
    forms = [""]
    for part in parts:
        if len(forms) * len(part) > MOST and len(forms) > 1:
            part = part[:1]
        forms = ["".join(pair) for pair in itertools.product(forms, part)]
    return forms


def _few(texts: Sequence[str], most: int = MOST) -> list[str]:
    distinct = list(dict.fromkeys(texts))
    return distinct if len(distinct) <= most else []


def _label(node: ast.expr) -> str:
    """What a reader calls a value whose text is known only in a run."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Call(func=ast.Name(id="type"), args=[of]), attr="__name__"):
            return f"type of {_label(of)}"
        case ast.Attribute(attr=name):
            return name.strip("_")
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return _label(value)
        case ast.Call(func=ast.Name(id="len"), args=[of]):
            return f"number of {_label(of)}"
        case ast.Call(func=ast.Attribute(attr="join"), args=[of]):
            return _label(of)
        case ast.Call(args=[of, *_]):
            return _label(of)
        case ast.Call(func=ast.Attribute(value=of)) | ast.Call(func=of):
            return _label(of)
        case ast.GeneratorExp(generators=[of, *_]) | ast.ListComp(generators=[of, *_]):
            return _label(of.iter)
        case ast.IfExp(body=ast.Constant(value=str(this)), orelse=ast.Constant(value=str(that))):
            return f"{this} or {that}" if this and that else this or that
        case ast.BinOp(left=of) | ast.IfExp(body=of):
            return _label(of)
        case ast.BoolOp(values=[of, *_]) | ast.Tuple(elts=[of, *_]) | ast.UnaryOp(operand=of):
            return _label(of)
        case ast.JoinedStr(values=parts):
            return next(
                (_label(p.value) for p in parts if isinstance(p, ast.FormattedValue)), "..."
            )
        case ast.Constant(value=value):
            return str(value)
    return "..."


def _assigned(nodes: Iterator[ast.AST] | Sequence[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
