"""``polydraft-conformance explain``: what each check proves, what a failure means, and where to look."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING

from polydraft_conformance.catalog import load_checks, matching_checks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polydraft_conformance.catalog import Check

__all__ = ["pages", "to_list", "to_text", "write_pages"]

_WIDTH = 100
_SCOPES = {
    "backend": "Once; no model is loaded.",
    "once": "Once, on the first pair.",
    "target": "For every target, with its own drafter.",
    "method": "For every target and drafter kind; in a quick run once for every drafter kind.",
    "kind": "For every target and drafter kind.",
    "case": "For every target, drafter kind and k.",
}
_MADE = "<!-- Made from the checks' docstrings by `polydraft-conformance explain --write docs/checks`. -->"


def to_list() -> str:
    """All checks by group, with their statements."""
    lines = []
    for group, checks in _groups():
        lines += [group, *(f"  {check.name}\n      {check.statement}" for check in checks), ""]
    return "\n".join([*lines, "More about one of them, or several: polydraft-conformance explain 'test_greedy_*'"])


def to_text(patterns: Sequence[str]) -> str:
    """The explanations of the checks that the patterns match, for a terminal.

    Raises:
        LookupError: A pattern matches no check.
    """
    names: list[str] = []
    for pattern in patterns:
        # The name as the report and pytest show it: with its case, in brackets, and without "test_".
        plain = pattern.rpartition("::")[2].partition("[")[0]
        found = matching_checks(plain) or matching_checks(f"test_{plain}")
        if not found:
            raise LookupError(
                f"No check is named {pattern!r}. polydraft-conformance explain, without a name, lists all of them."
            )
        names += [name for name in found if name not in names]
    checks = load_checks()
    return "\n\n".join(_explained(checks[name]) for name in names)


def pages() -> dict[str, str]:
    """File name -> Markdown: one page for each check, and ``README.md``, the index."""
    made = {f"{check.name}.md": _page(check) for check in load_checks().values()}
    index = [_MADE, "", "# The checks of the conformance suite", ""]
    for group, checks in _groups():
        index += [f"## {group}", "", "| check | |", "|---|---|"]
        index += [f"| [{check.name}]({check.name}.md) | {_cell(check.statement)} |" for check in checks]
        index.append("")
    made["README.md"] = "\n".join(index)
    return made


def write_pages(folder: Path) -> int:
    """Write all pages into a folder, remove those of checks that are gone, and return the number of checks."""
    made = pages()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("test_*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    return len(made) - 1


def _groups() -> list[tuple[str, list[Check]]]:
    checks = sorted(load_checks().values(), key=lambda check: check.group)
    return [(group, list(found)) for group, found in groupby(checks, key=lambda check: check.group)]


def _sections(check: Check) -> list[tuple[str, str]]:
    sections = [
        ("What it proves", check.proves),
        ("What a failure means", check.failure),
        ("Where to look", check.look),
        ("When it runs", _SCOPES[check.scope]),
    ]
    return [(title, text) for title, text in sections if text]


def _explained(check: Check) -> str:
    lines = [f"{check.name} ({check.group})", *textwrap.wrap(check.statement, _WIDTH), ""]
    for title, text in _sections(check):
        lines += [f"{title}:", *textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    if check.after:
        after = textwrap.wrap(", ".join(check.after), _WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += ["Where one of these fails as well, look there first:", *after]
    return "\n".join(lines)


def _page(check: Check) -> str:
    lines = [_MADE, "", f"# {check.name}", "", _escaped(check.statement), ""]
    for title, text in _sections(check):
        lines += [f"## {title}", "", *_wrapped(_escaped(text)), ""]
    if check.after:
        lines += ["## What to look at first", "", "Where one of these fails as well, it is the likely cause:", ""]
        lines += [f"- [{name}]({name}.md)" for name in check.after]
        lines.append("")
    lines += [f"[All checks](README.md) · source: `checks/test_{check.group}.py`", ""]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def _escaped(text: str) -> str:
    """Underscores outside code would begin emphasis, ``<`` a tag."""
    parts = text.split("`")
    return "`".join(
        part if index % 2 else part.replace("_", "\\_").replace("<", "&lt;") for index, part in enumerate(parts)
    )


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|")
