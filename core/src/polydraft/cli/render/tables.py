"""Tables and JSON that several commands show."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["gigabytes", "new_table", "to_json"]


def to_json(data: Any) -> str:
    """JSON for a program and a reader."""
    return json.dumps(data, indent=2, allow_nan=False)


def new_table(*columns: str) -> Table:
    """A table without frames; cells that are too long are folded, never cut."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def gigabytes(size: int | None) -> str:
    """Bytes as GiB; empty if not known.

    >>> gigabytes(3 * 2**30)
    '3.0 GiB'
    """
    return "" if size is None else f"{size / 2**30:.1f} GiB"
