"""The caches, as a table, as JSON, and what was removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft._cli.render.tables import FittingTable, to_json
from polydraft.caches import limit_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polydraft.caches import CacheEntry
    from polydraft.contract import CacheRecord

__all__ = ["cache_json", "cache_table", "cleared_json", "cleared_lines", "size"]


def cache_table(found: Iterable[tuple[CacheRecord, Sequence[CacheEntry]]]) -> FittingTable:
    """One row for each cache."""
    table = FittingTable("cache", "entries", "size", "at most", "what", "where")
    for record, entries in found:
        most = size(limit_bytes()) if record.bounded else ""
        table.add_row(record.name, str(len(entries)), size(_bytes(entries)), most, record.summary, record.path)
    return table


def cache_json(found: Iterable[tuple[CacheRecord, Sequence[CacheEntry]]]) -> str:
    """``{"caches": [...]}``; sizes in bytes, ``limit_bytes`` null where there is none."""
    return to_json(
        {
            "caches": [
                {
                    "name": record.name,
                    "summary": record.summary,
                    "path": record.path,
                    "entries": len(entries),
                    "bytes": _bytes(entries),
                    "limit_bytes": limit_bytes() if record.bounded else None,
                }
                for record, entries in found
            ]
        }
    )


def cleared_lines(cleared: Iterable[tuple[CacheRecord, Sequence[CacheEntry], Sequence[CacheEntry]]]) -> str:
    """One line for each cache: what was removed, and what is left because it is in use."""
    lines = []
    for record, entries, left in cleared:
        removed = f"{record.name}: removed {len(entries) - len(left)}, {size(_bytes(entries) - _bytes(left))}"
        lines.append(f"{removed}; {len(left)} in use or not removable" if left else removed)
    return "\n".join(lines)


def cleared_json(cleared: Iterable[tuple[CacheRecord, Sequence[CacheEntry], Sequence[CacheEntry]]]) -> str:
    """``{"cleared": [...]}``; ``left`` counts what is in use or may not be removed."""
    rows: list[dict[str, Any]] = [
        {
            "name": record.name,
            "removed": len(entries) - len(left),
            "removed_bytes": _bytes(entries) - _bytes(left),
            "left": len(left),
        }
        for record, entries, left in cleared
    ]
    return to_json({"cleared": rows})


def size(count: int) -> str:
    """A number of bytes for people.

    >>> size(0), size(5 << 20), size(3 << 29)
    ('0 B', '5.0 MiB', '1.5 GiB')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} B"


def _bytes(entries: Iterable[CacheEntry]) -> int:
    return sum(entry.bytes for entry in entries)
