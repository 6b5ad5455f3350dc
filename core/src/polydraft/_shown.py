"""How records show themselves: as one line in a Python prompt, and as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from polydraft._presentable import presentable

__all__ = ["Listing", "cut", "html_table", "html_text"]

_LONGEST = 60
_DRAFT = "color:#1a7f37;font-weight:600"
"""A green that is readable on light and dark pages."""


def cut(text: str) -> str:
    r"""``repr`` of a text, cut where it is long.

    >>> cut("a\nb")
    "'a\\nb'"
    """
    return repr(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...")


def html_text(pieces: Iterable[tuple[str, bool]]) -> str:
    """Text in pieces, each with whether it is an accepted draft; those are coloured."""
    parts = [
        f'<span style="{_DRAFT}" title="accepted draft">{escape(presentable(text))}</span>'
        if is_draft
        else escape(presentable(text))
        for text, is_draft in pieces
    ]
    return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(parts)}</div>'


def html_table(rows: Iterable[Mapping[str, str]], *, caption: str = "") -> str:
    """A small table; the keys of the first row are its head."""
    listed = list(rows)
    if not listed:
        return f"<i>{escape(caption or 'none')}</i>"
    style = 'style="text-align:left"'
    head = "".join(f"<th {style}>{escape(name)}</th>" for name in listed[0])
    body = "".join(
        f"<tr>{''.join(f'<td {style}>{escape(presentable(value))}</td>' for value in row.values())}</tr>"
        for row in listed
    )
    title = f'<caption style="text-align:left">{escape(presentable(caption))}</caption>' if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Listing(tuple[Any, ...]):
    """Records that show themselves as a table: each has ``_row()``, from column names to cells."""

    __slots__ = ()

    def __repr__(self) -> str:
        rows = [record._row() for record in self]
        if not rows:
            return "(none)"
        lines = [[*rows[0]], *([presentable(cell) for cell in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def _repr_html_(self) -> str:
        return html_table([record._row() for record in self])
