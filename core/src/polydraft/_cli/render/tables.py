"""Tables and JSON that several commands show."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from polydraft._presentable import presentable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

__all__ = ["FittingTable", "gigabytes", "to_json"]

_UNLIMITED = 10_000
_APART = 3
"""Columns between two cells."""


def to_json(data: Any) -> str:
    """Indented JSON."""
    return json.dumps(data, indent=2, allow_nan=False)


class FittingTable:
    """A table without frames. Where the terminal is too narrow for it, each row is a block of lines instead."""

    def __init__(self, *columns: str) -> None:
        self._columns = columns
        self._rows: list[tuple[Text | str, ...]] = []

    def add_row(self, *cells: Text | str) -> None:
        """Add a row; missing cells are empty."""
        self._rows.append(tuple(_shown(cell) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.box import SIMPLE_HEAD
        from rich.measure import Measurement
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, _APART - 1, 0, 0))
        least: list[int] = []
        widths: list[int] = []
        for index, column in enumerate(self._columns):
            cells = [column, *(row[index] for row in self._rows if index < len(row))]
            found = [Measurement.get(console, options.update(max_width=_UNLIMITED), _text(cell)) for cell in cells]
            # No word, such as a model's name, is folded, and no command, which could not be pasted.
            least.append(
                max(size.maximum if "`" in str(c) else size.minimum for c, size in zip(cells, found, strict=True))
            )
            widths.append(max(size.maximum for size in found))
        room = options.max_width - _APART * len(self._columns) + 1
        if sum(least) > room:
            yield self._blocks(options.max_width)
            return
        while sum(widths) > room:  # the widest gives way, as it has the most words to fold
            widest = max((at for at in range(len(widths)) if widths[at] > least[at]), key=widths.__getitem__)
            widths[widest] -= 1
        for column, width in zip(self._columns, widths, strict=True):
            table.add_column(column, overflow="fold", width=width)
        for row in self._rows:
            table.add_row(*row)
        yield table

    def _blocks(self, width: int) -> Text:
        """Each row as its first cell, and below it the others with their columns' names, as many a line as fit."""
        from rich.text import Text

        text = Text(overflow="fold")
        for number, row in enumerate(self._rows):
            text.append("\n" if number else "").append_text(_text(row[0]))
            used = width
            for column, cell in zip(self._columns[1:], row[1:], strict=False):
                if str(cell):
                    entry = Text.assemble((f"{column}: ", "dim"), _text(cell))
                    fits = used + _APART + entry.cell_len <= width
                    used = used + _APART + entry.cell_len if fits else 2 + entry.cell_len
                    text.append(" " * _APART if fits else "\n  ").append_text(entry)
            text.append("\n")
        text.rstrip()
        return text


def _text(cell: Text | str) -> Text:
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text(cell)


def _shown(cell: Text | str) -> Text | str:
    """A cell as the console will show it: widths are measured before that."""
    if isinstance(cell, str):
        return presentable(cell)
    cell = cell.copy()
    cell.plain = presentable(cell.plain)
    return cell


def gigabytes(size: int | None) -> str:
    """Bytes as GiB; empty if not known.

    >>> gigabytes(3 * 2**30)
    '3.0 GiB'
    """
    return "" if size is None else f"{size / 2**30:.1f} GiB"
