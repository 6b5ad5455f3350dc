"""A tuning as a chart, PNG and SVG, and as JSON, in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft._measuring.charts import CHOSEN, PLAIN, SPECULATIVE, Bar, bars, plot_bars, save_with_chart, title
from polydraft._measuring.identity import hardware_in_words

if TYPE_CHECKING:
    from pathlib import Path

    from polydraft._tune._records import TunedRow, TuningResult

__all__ = ["save"]

_MOST_ROWS = 30


def save(result: TuningResult, folder: Path) -> list[Path]:
    """Write ``tuning.json``, ``tuning.png`` and ``tuning.svg`` into a folder, which is made if needed.

    Raises:
        NotSavedError: The folder cannot be written.
    """
    return save_with_chart(result, folder, "tuning", lambda: _figure(result))


def _figure(result: TuningResult) -> Any:
    """One bar for each row that was measured."""
    rows = [_bar(row, chosen=at == result.chosen) for at, row in enumerate(result.rows) if row.tokens_per_second]
    rows.sort(key=lambda bar: -bar.tokens_per_second)
    shown = rows[:_MOST_ROWS]
    figure, (axes,) = bars(len(shown))
    plot_bars(axes, shown)
    left_out = f", {len(rows) - len(shown)} slower ones left out" if len(rows) > len(shown) else ""
    title(axes, f"{result.target}\n{hardware_in_words(result.processor, result.rows)}, {result.created[:10]}{left_out}")
    return figure


def _bar(row: TunedRow, *, chosen: bool) -> Bar:
    return Bar(
        label=f"{row.label} (chosen)" if chosen else row.label,
        tokens_per_second=row.tokens_per_second or 0.0,
        spread=row.spread if row.rounds > 1 else None,
        colour=CHOSEN if chosen else SPECULATIVE if row.method else PLAIN,
        figures=_figures(row),
    )


def _figures(row: TunedRow) -> str:
    parts = [f"{row.tokens_per_second:.1f}"]
    if row.acceptance_rate is not None:
        parts.append(f"{row.acceptance_rate:.0%} accepted")
    if row.state == "dropped":
        parts.append("dropped")
    return ", ".join(parts)
