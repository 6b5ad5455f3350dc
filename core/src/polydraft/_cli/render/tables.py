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

        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
        for index, column in enumerate(self._columns):
            cells = [column, *(row[index] for row in self._rows if index < len(row))]
            words = max(Measurement.get(console, options, _text(cell)).minimum for cell in cells)
            table.add_column(column, overflow="fold", min_width=words)  # no word, such as a model's name, is folded
        for row in self._rows:
            table.add_row(*row)
        if Measurement.get(console, options.update(max_width=_UNLIMITED), table).minimum <= options.max_width:
            yield table
        else:
            yield self._blocks()

    def _blocks(self) -> Text:
        from rich.text import Text

        text = Text(overflow="fold")
        for number, row in enumerate(self._rows):
            text.append("\n" if number else "").append_text(_text(row[0])).append("\n")
            for column, cell in zip(self._columns[1:], row[1:], strict=False):
                if str(cell):
                    text.append(f"  {column}: ", style="dim").append_text(_text(cell)).append("\n")
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
