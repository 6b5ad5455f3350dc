"""A tuning as a chart, PNG and SVG, and as JSON, in a folder. Drawn with matplotlib, without a display."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from polydraft.errors import PolydraftError
from polydraft.files import system_errors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polydraft._tune._records import TunedRow, TuningResult

__all__ = ["check_can_draw", "save"]

_MOST_ROWS = 30
_PLAIN, _SPECULATIVE, _CHOSEN = "#8a8f98", "#4c78a8", "#2a9d5c"
_INCHES_A_ROW, _INCHES = 0.32, 9.0


def check_can_draw() -> None:
    """Raise before anything is measured if no chart can be drawn.

    Raises:
        PolydraftError: Matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise PolydraftError("Charts need matplotlib, which is not installed.", "Run: pip install 'polydraft[charts]'")


def save(result: TuningResult, folder: Path) -> list[Path]:
    """Write ``tuning.json``, ``tuning.png`` and ``tuning.svg`` into a folder, which is made if needed.

    Raises:
        PolydraftError: The folder cannot be written.
    """
    paths = [folder / f"tuning.{suffix}" for suffix in ("json", "png", "svg")]
    try:
        with system_errors(f"The result cannot be saved in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            paths[0].write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
            _draw(result, paths[1:])
    except OSError as error:
        raise PolydraftError(
            f"The result cannot be saved in {folder}: {error.strerror or error}.", "Give another folder."
        ) from error
    return paths


def _draw(result: TuningResult, paths: Sequence[Path]) -> None:
    import matplotlib as mpl

    # Texts of an SVG stay texts; without the salt and the date, two files of one result would differ.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "polydraft", "font.family": "DejaVu Sans"}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters of a model's name that the font does not have
        figure = _figure(result)
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _figure(result: TuningResult) -> Any:
    """One bar for each row that was measured, with the spread of its rounds."""
    from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps figures

    rows = [(at, row) for at, row in enumerate(result.rows) if row.tokens_per_second]
    rows.sort(key=lambda entry: -(entry[1].tokens_per_second or 0.0))
    shown = rows[:_MOST_ROWS]
    figure = Figure(figsize=(_INCHES, 1.7 + _INCHES_A_ROW * max(len(shown), 1)), layout="constrained")
    axes = figure.add_subplot()
    names = [_name(row, chosen=at == result.chosen) for at, row in shown]
    speeds = [row.tokens_per_second or 0.0 for _, row in shown]
    colours = [_colour(row, chosen=at == result.chosen) for at, row in shown]
    axes.barh(range(len(shown)), speeds, color=colours, height=0.72, zorder=2)
    for at, (_, row) in enumerate(shown):
        if row.spread and row.rounds > 1:
            axes.plot(row.spread, (at, at), color="black", linewidth=1.0, marker="|", markersize=6, zorder=3)
        longest = max(row.spread[1] if row.spread and row.rounds > 1 else 0.0, row.tokens_per_second or 0.0)
        axes.annotate(_figures(row), (longest, at), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens/s of whole calls (median; line: slowest and fastest round)", fontsize=9)
    axes.grid(axis="x", color="#dddddd", zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    left_out = f", {len(rows) - len(shown)} slower ones left out" if len(rows) > len(shown) else ""
    # As text: matplotlib would read formulas between dollar signs.
    axes.set_title(
        f"{result.target}\n{result.processor.partition(' [')[0]}, {result.created[:10]}{left_out}",
        fontsize=10,
        loc="left",
        parse_math=False,
    )
    return figure


def _name(row: TunedRow, *, chosen: bool) -> str:
    return f"{row.label} (chosen)" if chosen else row.label


def _colour(row: TunedRow, *, chosen: bool) -> str:
    return _CHOSEN if chosen else _SPECULATIVE if row.method else _PLAIN


def _figures(row: TunedRow) -> str:
    parts = [f"{row.tokens_per_second:.1f}"]
    if row.acceptance_rate is not None:
        parts.append(f"{row.acceptance_rate:.0%} accepted")
    if row.state == "dropped":
        parts.append("dropped")
    return ", ".join(parts)
