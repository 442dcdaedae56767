"""What the site has beside the pages of docs/: ``mkdocs build`` calls these functions by name.

README, CONTRIBUTING and CHANGELOG become pages; so do the source files that pages link to; the
catalogue of errors is made from the source; formulas become MathML, which browsers draw without a
script. A link between pages is written as it works in the repository, and turned here.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

from catalogue import ROOT, ErrorClass, Message, catalogue

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages from outside docs/: where each stands in the site."""
CATALOGUE = "<!-- the catalogue of errors -->"
LINK = re.compile(r"\]\((?!#|[a-z]+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
UNSEARCHED = ("source/", "coverage/", "changelog")
"""Pages that would fill every search."""


def on_config(config: Any) -> Any:
    """Each class of errors has a page in the navigation."""
    for section in config.nav:
        if isinstance(section, dict) and "Errors" in section:
            section["Errors"] += [{c.name: _page_of(c)} for c in catalogue()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are no files of docs/."""
    for origin, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / origin).read_text()))
    for about in catalogue():
        files.append(File.generated(config, _page_of(about), content=_class_page(about)))
    for path in sorted(_linked_sources(files)):
        uri = _in_site(path)
        text = (ROOT / path).read_text()
        if uri.endswith(".md"):
            text = f"# {path}\n\n~~~~python\n{text}~~~~\n"
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them; the table of error classes."""
    if CATALOGUE in markdown:
        markdown = markdown.replace(CATALOGUE, _table(catalogue()))
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation"]
    if here.startswith("coverage/"):
        page.meta["hide"] = ["toc"]  # for the width of its table
    if here.startswith(UNSEARCHED):
        page.meta["search"] = {"exclude": True}
    origin = {uri: name for name, uri in PAGES.items()}.get(here, f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link["path"]))
        target = posixpath.relpath(_in_site(path), posixpath.dirname(here) or ".")
        return f"]({target}{link['anchor'] or ''})"

    if here.startswith(("source/", "errors/")):
        return markdown
    return _outside_code(markdown, lambda text: LINK.sub(turned, text))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas, which arithmatex marks, as MathML."""

    def drawn(formula: re.Match[str]) -> str:
        block = formula["tag"] == "div"
        latex = html.unescape(formula["latex"]).strip()
        found = latex2mathml.converter.convert(latex, display="block" if block else "inline")
        return f'<div class="formula">{found}</div>' if block else str(found)

    return re.sub(
        r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>',
        drawn,
        content,
        flags=re.DOTALL,
    )


# --- links ----------------------------------------------------------------------------------------


def _linked_sources(files: Files) -> set[str]:
    """Files of the repository, outside of what has a page, that some page links to."""
    found = set()
    pages = {name: (ROOT / name).read_text() for name in PAGES}
    docs = {f"docs/{file.src_uri}" for file in files if file.is_documentation_page()}
    pages |= {name: (ROOT / name).read_text() for name in docs if (ROOT / name).exists()}
    for origin, text in pages.items():
        for link in LINK.finditer(text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link["path"]))
            is_page = path in PAGES or (path.startswith("docs/") and not path.endswith(".py"))
            if not is_page and (ROOT / path).is_file():
                found.add(path)
    return found


def _in_site(path: str) -> str:
    if path in PAGES:
        return PAGES[path]
    if path.endswith(".py"):
        return f"source/{path.removesuffix('.py')}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if n % 2 else change(part) for n, part in enumerate(parts))


# --- errors ---------------------------------------------------------------------------------------


def _page_of(about: ErrorClass) -> str:
    return f"errors/{about.name}.md"


def _table(classes: Sequence[ErrorClass]) -> str:
    rows = [f"| [`{c.name}`]({_page_of(c)}) | {c.summary} | {len(c.messages)} |" for c in classes]
    return "\n".join(["| class | what it says | texts |", "|---|---|---|", *rows])


def _class_page(about: ErrorClass) -> str:
    grouped: dict[str, list[Message]] = {}
    for message in about.messages:
        grouped.setdefault(str(Path(message.file).parent), []).append(message)
    texts = "\n\n".join(
        (f"## From `{folder}`\n\n" if len(grouped) > 1 else "")
        + "\n\n".join(_entry(m, about) for m in messages)
        for folder, messages in grouped.items()
    )
    return (
        f"# {about.name}\n\n{about.summary} A `{about.base}`.\n\n"
        f"**Cause:** {about.cause}\n\n**Cure:** {about.cure}\n\n"
        "The texts, with all that they may hold; names stand for what a run puts in:\n\n"
        + texts
        + "\n"
    )


def _entry(message: Message, about: ErrorClass) -> str:
    cure = f"<p><b>Do:</b> {_shown(message.cure)}</p>" if message.cure else ""
    return (
        f'<div class="error"><p>{_shown(message.what)}</p>{cure}'
        f"<p><small>{message.file}</small></p></div>"
    )


def _shown(text: str) -> str:
    """As HTML, with the values' names marked."""
    lines = html.escape(text, quote=False).replace("\n", "<br>")
    for mark in "*_`[]|~^$\\":
        lines = lines.replace(mark, f"&#{ord(mark)};")
    return re.sub(r"\{([^{}]*)\}", r"<var>\1</var>", lines)
