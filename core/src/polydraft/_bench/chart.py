"""A benchmark as a chart, PNG and SVG, and as JSON, in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft._measuring.charts import (
    CHOSEN,
    PLAIN,
    SPECULATIVE,
    UPSTREAM,
    Bar,
    bars,
    plot_bars,
    save_with_chart,
    title,
    write_record,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polydraft._bench.records import BenchResult, BenchRow

__all__ = ["save", "write"]

_NOT_SPLIT = "#b9c3d3"
_PARTS = {"draft": "#4c78a8", "verify": "#2a9d5c", "choose": "#c9862c", "host": "#8a8f98"}


def save(result: BenchResult, folder: Path) -> list[Path]:
    """Write ``bench.json``, ``bench.png`` and ``bench.svg`` into a folder, which is made if needed.

    Raises:
        NotSavedError: The folder cannot be written.
    """
    return save_with_chart(result, folder, "bench", lambda: _figure(result))


def write(result: BenchResult, folder: Path) -> None:
    """Write ``bench.json`` alone.

    Raises:
        OSError: The folder cannot be written.
    """
    write_record(result, folder / "bench.json")


def _figure(result: BenchResult) -> Any:
    """Speeds, next to the milliseconds of a round where they are known."""
    rows = [row for row in result.rows if row.tokens_per_second]
    figure, axes = bars(len(rows), 1 + any(row.round_ms for row in rows))
    dtypes = dict.fromkeys(row.dtype for row in rows if row.dtype)
    plot_bars(axes[0], [_bar(row, best=row is result.best) for row in rows])
    title(axes[0], f"{result.title}\n{result.hardware}, {', '.join(dtypes)}, {result.created[:10]}")
    for rounds in axes[1:]:
        _plot_rounds(rounds, rows)
    return figure


def _bar(row: BenchRow, *, best: bool) -> Bar:
    parts = [f"{row.tokens_per_second:.1f}"]
    if row.times_plain is not None:
        parts.append(f"{row.times_plain:.2f} x plain")
    if row.acceptance_rate is not None:
        parts.append(f"{row.acceptance_rate:.0%} accepted")
    return Bar(
        label=row.label,
        tokens_per_second=row.tokens_per_second or 0.0,
        spread=row.spread if row.repeats > 1 else None,
        colour=UPSTREAM if row.upstream else CHOSEN if best else SPECULATIVE if row.method else PLAIN,
        figures=", ".join(parts),
    )


def _plot_rounds(axes: Any, rows: Sequence[BenchRow]) -> None:
    """The parts of a round, one after the other; in one piece where they are not known."""
    for at, row in enumerate(rows):
        times = row.round_ms
        if times is None:
            continue
        left = 0.0
        if times.verify is None:
            left = times.total - (times.host or 0.0)
            axes.barh(at, left, color=_NOT_SPLIT, height=0.72, zorder=2)
        for part, colour in _PARTS.items():
            width = getattr(times, part)
            if width is not None:
                axes.barh(at, width, left=left, color=colour, height=0.72, zorder=2)
                left += width
    axes.legend(
        [_patch(colour) for colour in _PARTS.values()],
        list(_PARTS),
        fontsize=8,
        frameon=False,
        ncols=len(_PARTS),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        handlelength=1,
        columnspacing=1,
    )
    axes.set_xlim(left=0)
    axes.set_xlabel("ms of a round (of a step)", fontsize=9)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)
