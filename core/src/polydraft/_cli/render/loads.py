"""What loads took, as ``bench`` and ``tune`` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft._cli.render.cache import size
from polydraft._cli.render.tables import FittingTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft._bench.records import BenchRow
    from polydraft._tune._records import TunedRow

__all__ = ["loads_table"]


def loads_table(rows: Iterable[tuple[str, BenchRow | TunedRow]]) -> FittingTable:
    """One row for each load: what it is called, its time, memory, dtype and device."""
    table = FittingTable("engine", "load", "peak memory", "on the device", "dtype", "device")
    seen = set()
    for name, row in rows:
        load = (row.backend, row.load_seconds)
        if load in seen:
            continue
        seen.add(load)
        table.add_row(
            name,
            "" if row.load_seconds is None else f"{row.load_seconds:.1f} s",
            "" if row.peak_memory_bytes is None else size(row.peak_memory_bytes),
            "" if row.device_memory_bytes is None else size(row.device_memory_bytes),
            row.dtype,
            row.device,
        )
    return table
