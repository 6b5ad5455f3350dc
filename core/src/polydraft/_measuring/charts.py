"""Charts of measurements, PNG and SVG, next to their JSON in a folder. Drawn with matplotlib, without a display."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.errors import InvalidRequestError, NotSavedError, PolydraftError
from polydraft.files import check_folder, system_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polydraft.contract.records import Record

__all__ = [
    "CHOSEN",
    "PLAIN",
    "SPECULATIVE",
    "UPSTREAM",
    "Bar",
    "bars",
    "folder_to_save",
    "plot_bars",
    "save_with_chart",
    "title",
    "write_record",
]

PLAIN, SPECULATIVE, CHOSEN, UPSTREAM = "#8a8f98", "#4c78a8", "#2a9d5c", "#c9862c"
_INCHES_A_ROW, _INCHES = 0.32, 9.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a chart of speeds."""

    label: str
    tokens_per_second: float
    spread: tuple[float, float] | None
    """The slowest and the fastest round; None: there is only one."""
    colour: str
    figures: str
    """What is written behind it."""


def folder_to_save(given: str | Path, progress: Callable[[str], None] | None = None) -> tuple[Path, tuple[str, ...]]:
    """The folder of ``save_to``, checked before anything is measured, and a note if no chart can be drawn.

    ``progress`` is told the note.

    Raises:
        InvalidRequestError: Its name is empty.
        PolydraftError: It cannot be written.
    """
    if not str(given).strip():
        raise InvalidRequestError("`save_to` is empty.", "Name a folder, or leave it out.", argument="save_to")
    folder = Path(given).expanduser()
    with _saving_in(folder):
        check_folder(folder)
    if _can_draw():
        return folder, ()
    note = "No chart is drawn: matplotlib is not installed. Run: `pip install 'polydraft[charts]'`"
    if progress is not None:
        progress(note)
    return folder, (note,)


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def save_with_chart(result: Record, folder: Path, name: str, draw: Callable[[], Any]) -> list[Path]:
    """Write ``NAME.json``, and with matplotlib ``NAME.png`` and ``NAME.svg``, into a folder, which is made if needed.

    Args:
        result: The record.
        folder: The folder.
        name: Of the files.
        draw: Makes the figure.

    Raises:
        NotSavedError: The folder cannot be written.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", *(("png", "svg") if _can_draw() else ()))]
    try:
        with _saving_in(folder):
            write_record(result, paths[0])
            if len(paths) > 1:
                _draw(draw, paths[1:])
    except PolydraftError as error:
        raise NotSavedError(error.message, error.hint, result) from error
    return paths


def write_record(result: Record, path: Path) -> None:
    """Write a record as JSON; its folder is made if needed.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")


@contextmanager
def _saving_in(folder: Path) -> Iterator[None]:
    what = f"The result cannot be saved in {folder}"
    try:
        with system_errors(what):
            yield
    except OSError as error:
        raise PolydraftError(f"{what}: {error.strerror or error}.", "Give another folder.") from error


def _draw(draw: Callable[[], Any], paths: Sequence[Path]) -> None:
    import matplotlib as mpl

    # Texts of an SVG stay texts; without the salt and the date, two files of one result would differ.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "polydraft", "font.family": "DejaVu Sans"}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters of a model's name that the font does not have
        figure = draw()
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def bars(rows: int, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure for so many rows, and its axes, side by side."""
    from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps figures

    size = (_INCHES + 4.0 * (columns - 1), 1.7 + _INCHES_A_ROW * max(rows, 1))
    figure = Figure(figsize=size, layout="constrained")
    widths = [2.0] + [1.0] * (columns - 1)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False, width_ratios=widths)[0]
    for one in axes:
        one.grid(axis="x", color="#dddddd", zorder=0)
        for side in ("top", "right", "left"):
            one.spines[side].set_visible(False)
        one.tick_params(axis="y", length=0)
    return figure, list(axes)


def plot_bars(axes: Any, shown: Sequence[Bar]) -> None:
    """One bar for each row, with the spread of its rounds; the first one on top."""
    axes.barh(
        range(len(shown)),
        [one.tokens_per_second for one in shown],
        color=[one.colour for one in shown],
        height=0.72,
        zorder=2,
    )
    for at, one in enumerate(shown):
        if one.spread:
            axes.plot(one.spread, (at, at), color="black", linewidth=1.0, marker="|", markersize=6, zorder=3)
        longest = max(one.spread[1] if one.spread else 0.0, one.tokens_per_second)
        axes.annotate(one.figures, (longest, at), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [one.label for one in shown], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens/s of whole calls (median; line: slowest to fastest)", fontsize=9)


def title(axes: Any, text: str) -> None:
    """The title, as text: matplotlib would read formulas between dollar signs."""
    axes.set_title(text, fontsize=10, loc="left", parse_math=False)
