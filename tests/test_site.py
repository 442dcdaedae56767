"""The documentation holds together: links, anchors, and the catalogue of errors.

`make docs` builds the site and takes any warning for an error; this is what needs no builder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from catalogue import ROOT, catalogue
from ringfx import errors

CLASSES = {
    name for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.RingfxError)
}  # fmt: skip
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.finditer(FENCE.sub("", page.read_text())):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        anchor = link["anchor"]
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link[0])
    assert not broken


def _anchors(page: Path) -> set[str]:
    """As GitHub and the site make them from headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    made = {"index.md", "contributing.md", "changelog.md"}
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert {*listed} == pages | made
    assert len(listed) == len({*listed})


# --- errors ---------------------------------------------------------------------------------------


def test_every_class_of_errors_has_an_entry() -> None:
    found = catalogue()
    assert {about.name for about in found} == CLASSES
    assert all(about.messages and about.cause and about.cure for about in found)


def test_every_text_of_an_error_has_an_entry() -> None:
    """Counted here in another way: every ``raise`` of one of the classes, by its line."""
    told = {place for about in catalogue() for m in about.messages for place in m.places}
    raised = set()
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).split(".")[-1]
                if name in CLASSES:
                    raised.add(f"{path}:{node.exc.lineno}")
    assert len(raised) > 200
    assert raised <= told


PASSED_ON = {
    "What a file holds cannot be used; the texts are below.",
    "{layer}: a reason of StrategyRefused, below, and what to do.",
    "The report of `ringfx.verify`, which names what differs first.",
    "Rank 0's error, on all ranks.",
}
"""Texts that are made elsewhere, which say what to do themselves."""


def test_every_text_of_an_error_says_what_to_do() -> None:
    silent = {m.text: m.places for about in catalogue() for m in about.messages if not m.cure}
    assert silent.keys() == PASSED_ON, silent


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("ringfx", "passes", "cost_model"):
        for path in (ROOT / folder).rglob("*.py"):
            yield path.resolve().relative_to(ROOT), ast.parse(path.read_text())


ERRORS = '''
class RingfxError(RuntimeError):
    """The base.

    Cause: one.

    Cure: another.
    """


class Lost(RingfxError):
    """Something is lost.

    Cause: it was put {somewhere}.
{cure}    """
'''

RAISES = """
from ringfx.errors import Lost
from ringfx.words import what

def f(x, error: type[Lost] = Lost):
    if x == 1:
        raise Lost(f"{x.name} is lost" + (" twice" if x.twice else "") + ". Do: look for it.")
    if x == 2:
        raise Lost(what(x))
    raise error(TEXT.format(x))

TEXT = "there is no {} at all"
"""

WORDS = """
def what(x) -> str:
    size = f"{x.size:,} B"
    return f"{size} are gone"
"""


def _planted(root: Path, *, cure: str = "\n    Cure: look.\n", more: str = "") -> Path:
    (root / "ringfx").mkdir(exist_ok=True)
    (root / "ringfx" / "errors.py").write_text(
        ERRORS.replace("{somewhere}", "there").replace("{cure}", cure)
    )
    (root / "ringfx" / "f.py").write_text(RAISES + more)
    (root / "ringfx" / "words.py").write_text(WORDS)
    return root


def test_texts_are_read_through_functions_names_and_parameters(tmp_path: Path) -> None:
    base, lost = catalogue(_planted(tmp_path))
    assert (base.messages, lost.cause, lost.cure) == ((), "it was put there.", "look.")
    assert {(m.what, m.cure) for m in lost.messages} == {
        ("{name} is lost twice.", "look for it."),
        ("{size} B are gone", ""),
        ("there is no {} at all", ""),
    }


def test_a_class_without_a_cure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='Lost has no "Cure:" paragraph'):
        catalogue(_planted(tmp_path, cure=""))


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    more = "\ndef g(text):\n    raise Lost(text)\n"
    with pytest.raises(ValueError, match=r"ringfx/f.py:15: \{text\}"):
        catalogue(_planted(tmp_path, more=more))
