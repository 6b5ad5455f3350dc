"""A finished benchmark: its tables, and the JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from polydraft._cli.render.loads import loads_table
from polydraft._cli.render.tables import FittingTable
from polydraft._flags import in_flags

if TYPE_CHECKING:
    from rich.console import RenderableType

    from polydraft._bench.records import BenchResult, BenchRow

__all__ = ["bench_json", "bench_summary"]


def bench_json(found: BenchResult) -> str:
    """The object of ``polydraft bench --json``, on one line, in ASCII: the record."""
    return json.dumps(found.model_dump(mode="json"), allow_nan=False)


def bench_summary(found: BenchResult) -> RenderableType:
    """Speeds, rounds, acceptance by position, speeds by class, engines, and what could not be measured."""
    from rich.console import Group
    from rich.text import Text

    synthetic = found.synthetic_acceptance is not None
    parts: list[RenderableType] = [Text(found.title, style="bold red" if synthetic else "bold"), Text()]
    measured = [row for row in found.rows if row.tokens_per_second]
    if measured:
        for table in (
            _speeds(found),
            _rounds(measured),
            _classes(found, measured),
            _loads(measured),
        ):
            if table is not None:
                parts += [table, Text()]
    parts += [
        Text(f"{row.label}: {row.state}: {in_flags(row.reason)}", style="yellow") for row in found.rows if row.reason
    ]
    parts += [Text(in_flags(note), style="dim") for note in found.notes]
    repeats = f"{found.repeats} repeat{'' if found.repeats == 1 else 's'}"
    parts.append(Text(f"{found.hardware}; {repeats}; {found.seconds:.0f} s of measuring", style="dim"))
    return Group(*parts)


def _speeds(found: BenchResult) -> FittingTable:
    rows = found.table()
    used = [name for name in rows[0] if name == "" or any(row[name] for row in rows)]
    table = FittingTable(*used)
    for row in rows:
        table.add_row(*(row[name] for name in used))
    return table


def _rounds(rows: list[BenchRow]) -> FittingTable | None:
    """Milliseconds of a round, and acceptance by position."""
    if not any(row.round_ms or row.acceptance_rate_per_position for row in rows):
        return None
    table = FittingTable("ms of a round", "all", "draft", "verify", "choose", "host", "accepted by position")
    for row in rows:
        times: Any = row.round_ms
        cells = [None if times is None else getattr(times, part) for part in ("total", *_PARTS)]
        accepted = row.acceptance_rate_per_position or ()
        table.add_row(
            row.label,
            *("" if cell is None else f"{cell:.2f}" for cell in cells),
            " ".join(f"{rate:.0%}" for rate in accepted),
        )
    return table


def _loads(rows: list[BenchRow]) -> FittingTable:
    loads = {(row.backend, row.load_seconds) for row in rows}
    one = {name for name, _ in loads if sum(name == other for other, _ in loads) == 1}
    return loads_table((row.backend if row.backend in one else row.label, row) for row in rows)


_PARTS = ("draft", "verify", "choose", "host")


def _classes(found: BenchResult, rows: list[BenchRow]) -> FittingTable | None:
    kinds = list(found.prompts)
    if len(kinds) < 2:
        return None
    table = FittingTable("tokens/s (x plain)", *kinds)
    for row in rows:
        table.add_row(row.label, *(_of_class(row.by_class.get(kind, {})) for kind in kinds))
    return table


def _of_class(told: dict[str, float]) -> str:
    speed, times = told.get("tokens_per_second"), told.get("times_plain")
    return "" if speed is None else f"{speed:.1f}" + ("" if times is None else f" ({times:.2f})")
