"""The documentation site: hooks of MkDocs (mkdocs.yml), and the page of errors.

``python ci/pages.py [--check]`` writes docs/errors.md from the docstrings of ``polydraft.errors``. Made for the site
alone are the changelog, a page for each public module, and under each error the sentences that the code raises.
"""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import benchmarks

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ERRORS = ROOT / "docs/errors.md"
SOURCES = ("core/src", "plugins/*/src", "server/src", "conformance/src")
_HEAD = """<!-- Made from the docstrings of `polydraft.errors` by `python ci/pages.py`. -->

# Errors and how to mend them

Everything that polydraft raises on purpose is a `PolydraftError`. `message` says what is wrong, in one sentence, and
`hint` what to do; the command line prints both. Errors are raised before work is lost: before a download, before
weights are loaded, before the first token. A command in a hint works when it is pasted.

```python
import polydraft
from polydraft.errors import BackendNotFoundError, BackendUnavailableError, PolydraftError

try:
    session = polydraft.load("google/gemma-4-E4B-it", backend="vllm")
except (BackendNotFoundError, BackendUnavailableError) as error:
    print(error.hint)  # the command that installs it
except PolydraftError as error:
    print(error.message)
```
"""
_LINK = re.compile(r"\[((?:[^\]\\]|\\.)*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def errors_page() -> str:
    """The page: each error with its cause and its remedy."""
    from polydraft import errors

    parts = [_HEAD]
    for name in sorted(errors.__all__):
        kind = getattr(errors, name)
        cause, remedy = cause_and_remedy(kind)
        if name == "PolydraftError":
            continue
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        parts.append(f"## {name}\n\n{cause}\n\n**To mend it:** {remedy}\n\nSubclass of {bases}.\n")
    return "\n".join(parts)


def cause_and_remedy(kind: type) -> tuple[str, str]:
    """From a docstring: what is before ``Args:``, and its paragraph ``To mend it: ...``."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\nArgs:")[0].replace("``", "`")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    remedies = [one.removeprefix("To mend it: ") for one in paragraphs if one.startswith("To mend it: ")]
    remedy = remedies[0] if remedies else ""
    return " ".join(one for one in paragraphs if not one.startswith("To mend it: ")), remedy[:1].upper() + remedy[1:]


def raised() -> dict[str, list[tuple[str, str]]]:
    """Error -> the sentences (message, hint) with which the code raises it; what is filled in is written ``...``."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for pattern in SOURCES:
        for folder in sorted(ROOT.glob(pattern)):
            for file in sorted(folder.rglob("*.py")):
                text = file.read_text(encoding="utf-8")
                for name, sentences in _raised_in(ast.parse(text)) if "Error(" in text else ():
                    found.setdefault(name, {})[sentences] = None
    return {name: list(sentences) for name, sentences in found.items()}


def _raised_in(tree: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id.endswith("Error")
            and node.args
        ):
            message, *others = (_template(argument) for argument in node.args[:2])
            if message.strip(". "):
                yield node.func.id, (message, others[0] if others else "")


def _template(node: ast.expr) -> str:
    """A string, with ``...`` for what is filled in; empty if it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return ""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made for the site alone, and the files of the repository that pages lead to."""
    from mkdocs.structure.files import File
    from polydraft.contract import PUBLIC_MODULES

    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changes))
    rows = "".join(f"| [`{name}`]({name}.md) | {purpose} |\n" for name, purpose in PUBLIC_MODULES.items())
    index = f"# API reference\n\nThe public modules; all others are private.\n\n| module | |\n|---|---|\n{rows}"
    files.append(File.generated(config, "reference/index.md", content=index))
    for name in PUBLIC_MODULES:
        content = apps_page() if name == "polydraft" else f"# {name}\n\n::: {name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    for name, content in repository_files().items():
        files.append(File.generated(config, name, content=content))
    return files


def apps_page() -> str:
    """What apps use. The names of ``polydraft`` are loaded on first use, so they are looked up."""
    import polydraft

    parts = ["# polydraft\n\n::: polydraft\n"]
    for name in sorted(vars(polydraft)["__all__"], key=str.lower):
        found = getattr(polydraft, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            where = f"{found.__module__}.{found.__qualname__}"
            parts.append(f"## {name}\n\n::: {where}\n    options: {{ heading_level: 3, show_root_heading: false }}\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to the site's copies. The page of errors gets the sentences of the code."""
    name = page.file.src_uri
    return with_links(with_sentences(markdown) if name == "errors.md" else markdown, name)


def with_links(markdown: str, page: str) -> str:
    """The text of a page with its links as they are on the site."""
    base = posixpath.dirname(_source(page))

    def leads(found: re.Match[str]) -> str:
        place = _place(posixpath.normpath(posixpath.join(base, found[2])))
        return f"[{found[1]}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{found[3] or ''})"

    return markdown if page.startswith("reference/") else _LINK.sub(leads, markdown)


def repository_files() -> dict[str, str]:
    """The files of the repository that pages lead to, and those that these lead to: place on the site -> content."""
    found: dict[str, str] = {}
    waiting = [f"docs/{path.relative_to(ROOT / 'docs').as_posix()}" for path in sorted((ROOT / "docs").rglob("*.md"))]
    waiting.append("CHANGELOG.md")
    while waiting:
        source = waiting.pop()
        place, text = _place(source), _content(source)
        if place.startswith("repository/"):
            found[place] = text
        if place.endswith(".md"):
            base = posixpath.dirname(_source(place))
            leads = (posixpath.normpath(posixpath.join(base, link[2])) for link in _LINK.finditer(text))
            waiting += [one for one in leads if _place(one).startswith("repository/") and _place(one) not in found]
    return found


def _place(source: str) -> str:
    """Where a file or a folder of the repository is on the site. Code is shown as text."""
    if source == "CHANGELOG.md":
        return "changelog.md"
    if (ROOT / source).is_dir():
        has_readme = (ROOT / source / "README.md").is_file()
        source = posixpath.join(source, "README.md" if has_readme else "index.md")
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"repository/{source if source.endswith(('.md', '.txt', '.json', '.svg')) else f'{source}.txt'}"


def _source(place: str) -> str:
    """The file of the repository that is on the site at a place."""
    if place == "changelog.md":
        return "CHANGELOG.md"
    return place.removeprefix("repository/") if place.startswith("repository/") else f"docs/{place}"


def _content(source: str) -> str:
    path = ROOT / source
    if not path.is_dir():
        return path.read_text(encoding="utf-8")
    if (path / "README.md").is_file():
        return (path / "README.md").read_text(encoding="utf-8")
    names = sorted(one.name for one in path.iterdir() if not one.name.startswith(("_", ".")) or one.suffix == ".py")
    return f"# {source}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)


def with_sentences(markdown: str) -> str:
    """The page of errors with what the code raises, folded up under each."""
    sentences = raised()
    parts = re.split(r"(?m)^## (\w+)\n", markdown)
    done = [parts[0]]
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        rows = "".join(f"    | {_cell(message)} | {_cell(hint)} |\n" for message, hint in sentences.get(name, ()))
        told = (
            f'\n??? note "What it says"\n\n    | what is wrong | what to do |\n    |---|---|\n{rows}\n' if rows else ""
        )
        done.append(f"## {name}\n{text.rstrip()}\n{told}\n")
    return "".join(done)


def _cell(text: str) -> str:
    return " ".join(re.sub(r"([|<>*_\[\]])", r"\\\1", text).split())


def main() -> int:
    """Write the page of errors, or with ``--check`` compare it."""
    return benchmarks.update(ERRORS, errors_page(), "docs/errors.md is out of date: run `python ci/pages.py`.")


if __name__ == "__main__":
    sys.exit(main())
