"""A finished tuning: its tables, and the JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from polydraft._cli.render.loads import loads_table
from polydraft._cli.render.tables import FittingTable
from polydraft._flags import in_flags

if TYPE_CHECKING:
    from rich.console import RenderableType

    from polydraft._tune._records import TunedRow, TuningResult

__all__ = ["tuning_json", "tuning_summary"]


def tuning_json(found: TuningResult) -> str:
    """The object of ``polydraft tune --json``, on one line, in ASCII: the record, and the chosen row as ``choice``."""
    choice = found.choice
    data: dict[str, Any] = {
        "choice": None if choice is None else choice.model_dump(mode="json"),
        **found.model_dump(mode="json"),
    }
    return json.dumps(data, allow_nan=False)


def tuning_summary(found: TuningResult) -> RenderableType:
    """Speeds, speeds by class, engines, what could not be measured, and the choice."""
    from rich.console import Group
    from rich.text import Text

    measured = [row for row in found.rows if row.tokens_per_second]
    parts: list[RenderableType] = []
    if measured:
        parts += [
            _speeds(found, measured),
            Text(),
            _classes(found, measured),
            Text(),
            loads_table((f"{row.backend} {row.method or 'plain'}", row) for row in measured),
            Text(),
        ]
    for row in found.rows:
        if row.reason and row.state != "dropped":
            what = row.backend if row.state == "refused" and not row.method else row.label
            parts.append(Text(f"{what}: {row.state}: {in_flags(row.reason)}", style="yellow"))
    parts.append(_choice(found))
    parts += [Text(in_flags(note), style="dim") for note in found.notes]
    return Group(*parts)


def _speeds(found: TuningResult, rows: list[TunedRow]) -> FittingTable:
    table = FittingTable("", "tokens/s", "rounds", "x plain", "first token", "accepted", "output")
    for row in rows:
        plain = found.fastest(row.backend, plain=True)
        times = ""
        if row.method and plain and plain.tokens_per_second and row.tokens_per_second:
            times = f"{row.tokens_per_second / plain.tokens_per_second:.2f}"
        table.add_row(
            _label(found, row),
            f"{row.tokens_per_second:.1f}",
            f"{row.spread[0]:.1f}-{row.spread[1]:.1f} ({row.rounds})" if row.spread else "",
            times,
            "" if row.first_token_seconds is None else f"{row.first_token_seconds * 1000:.0f} ms",
            "" if row.acceptance_rate is None else f"{row.acceptance_rate:.0%}",
            row.verdict or ("not judged" if row.same_as_plain is False else "same" if row.same_as_plain else ""),
        )
    return table


def _label(found: TuningResult, row: TunedRow) -> str:
    mark = " (chosen)" if row is found.choice else " (dropped)" if row.state == "dropped" else ""
    return f"{row.label}{mark}"


def _classes(found: TuningResult, rows: list[TunedRow]) -> FittingTable:
    kinds = list(found.prompts)
    table = FittingTable("tokens/s", *kinds)
    for row in rows:
        if row.state == "measured":
            table.add_row(row.label, *(f"{row.by_class[kind]:.1f}" if kind in row.by_class else "" for kind in kinds))
    return table


def _choice(found: TuningResult) -> RenderableType:
    from rich.text import Text

    choice = found.choice
    if choice is None:
        return Text("Nothing was measured.", style="bold red")
    how = f"{choice.label}: {choice.tokens_per_second:.1f} tokens/s"
    sure = ""
    if found.confidence is not None:
        sure = f"; within 5% of the fastest with a confidence of {found.confidence:.0%}"
    kept = "" if found.kept else " (not kept)"
    return Text(f"chosen{kept}: {how}{sure}; {found.seconds:.0f} s of measuring", style="green")
