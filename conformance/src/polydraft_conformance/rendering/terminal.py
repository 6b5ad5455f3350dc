"""What a run in progress shows on a terminal and in a log: failures as they come, and a bar or the stages done."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polydraft_conformance.rendering.causes import shape_of
from polydraft_conformance.rendering.statuses import Tone, counted_by_status, look_of
from polydraft_conformance.rows import case_of_row

__all__ = ["Line", "Live", "Place", "Style", "Writer", "clock", "cut", "style_of", "write_line"]

Part = tuple[str, Tone | None]
Line = Sequence[Part]
"""A line of text in parts, each with its tone; None: as the terminal's other text."""

_MARKUP: dict[Tone | None, dict[str, bool]] = {
    "good": {"green": True},
    "bad": {"red": True},
    "warn": {"yellow": True},
    "off": {"light": True},
    None: {},
}
_BAR = 24
"""Columns of the bar."""


class Writer(Protocol):
    """What is needed of pytest's terminal reporter."""

    def write(self, content: str, *, flush: bool = False, **markup: bool) -> None:
        """Write a part of a line."""


@dataclass(frozen=True, slots=True)
class Style:
    """How much is shown, and by which characters."""

    live: bool = False
    """A bar that is updated in place; otherwise plain lines only, for logs."""
    verbosity: int = 0
    unicode: bool = True

    def mark(self, status: str) -> str:
        """The mark of a status."""
        look = look_of(status)
        return look.mark if self.unicode else look.plain_mark


def style_of(*, is_terminal: bool, may_update: bool, verbosity: int) -> Style:
    """The style of a run.

    Args:
        is_terminal: Whether the output goes to a terminal.
        may_update: False where something else writes to the terminal in between, such as a debugger.
        verbosity: pytest's.
    """
    stream = sys.__stdout__
    try:
        "✓✗━─…".encode(getattr(stream, "encoding", None) or "ascii")
        unicode = True
    except (UnicodeEncodeError, LookupError):
        unicode = False
    on_ci = any(os.environ.get(name) for name in ("CI", "BUILD_NUMBER"))  # as pytest tells it
    live = is_terminal and may_update and not on_ci and os.environ.get("TERM") != "dumb" and verbosity <= 0
    return Style(live, verbosity, unicode)


@dataclass(frozen=True, slots=True)
class Place:
    """What an item runs: a check on a case."""

    check: str
    group: str
    target: str | None
    kind: str | None
    k: int | None

    @property
    def stage(self) -> str:
        """What is completed at a time: a target with a drafter kind."""
        return f"{self.target}, {self.kind}" if self.target else "the backend itself"

    @property
    def case(self) -> str:
        """``tiny-e2b, mtp, k=4``, or an empty string."""
        return case_of_row({"target": self.target, "kind": self.kind, "k": self.k})


class Live:
    """The display of a run in progress. Each row is given to ``add`` once."""

    def __init__(self, writer: Writer, style: Style, planned: Sequence[Place]) -> None:
        self._writer = writer
        self._style = style
        self._total = len(planned)
        self._left = Counter(place.stage for place in planned)
        self._rows: dict[str, list[Mapping[str, Any]]] = {}
        self._counts: Counter[str] = Counter()
        self._said: set[tuple[str, str]] = set()
        self._current: Place | None = None
        self._started = time.monotonic()
        self._drawn = False

    @property
    def seconds(self) -> float:
        """Since the first check."""
        return time.monotonic() - self._started

    def start(self, place: Place | None) -> None:
        """A check begins."""
        self._current = place
        self._draw()

    def add(self, row: Mapping[str, Any]) -> None:
        """A check has ended on a case."""
        self._counts[row["status"]] += 1
        self._say_failure(row)
        place = Place(row["check"], row["group"], row["target"], row["kind"], row["k"])
        self._rows.setdefault(place.stage, []).append(row)
        self._left[place.stage] -= 1
        if not self._style.live and self._style.verbosity == 0 and self._left[place.stage] == 0:
            said = counted_by_status(self._rows[place.stage])
            width = len(str(self._total))
            done = f"[{self._counts.total():{width}}/{self._total}]"
            failed = any(other["status"] in {"fail", "follows"} for other in self._rows[place.stage])
            tone: Tone = "bad" if failed else "good"
            self.line([(f"{done} {place.stage}: ", None), (said, tone), (f" ({clock(self.seconds)})", None)])
        self._draw()

    def erase(self) -> None:
        """Remove the bar, before something else is written."""
        if self._drawn:
            # The bar is always a whole line, and the cursor is below it.
            self._writer.write("\x1b[1A\r\x1b[2K", flush=True)
            self._drawn = False

    def line(self, parts: Line) -> None:
        """A line that stays."""
        self.erase()
        write_line(self._writer, parts)

    def _say_failure(self, row: Mapping[str, Any]) -> None:
        """The first case of each cause, at once. With -v pytest names every case itself."""
        key = row["check"], shape_of(row["reason"])
        if row["status"] != "fail" or key in self._said or self._style.verbosity > 0:
            return
        self._said.add(key)
        case = case_of_row(row)
        first = str(row["reason"]).partition("\n")[0]
        self.line([(f"{self._style.mark('fail')} {row['check']}{f' ({case})' if case else ''}: {first}", "bad")])

    def _draw(self) -> None:
        if not self._style.live:
            return
        self.erase()
        done = self._counts.total()
        filled = min(_BAR, _BAR * done // max(1, self._total))
        full, empty = ("━", "─") if self._style.unicode else ("#", "-")
        failed, following = self._counts["fail"], self._counts["follows"]
        tone: Tone = "bad" if failed + following else "good"
        parts: list[Part] = [(full * filled, tone), (empty * (_BAR - filled), "off"), (f" {done}/{self._total}", None)]
        if failed:
            parts.append((f"  {failed} failed", "bad"))
        if following:
            parts.append((f"  {following} follow", "warn"))
        parts.append((f"  {clock(self.seconds)}", None))
        if self._current is not None:
            case = f"{self._current.case}: " if self._current.case else ""
            parts.append((f"  {case}{self._current.check}", "off"))
        self.line(cut(parts, self._style))
        self._drawn = True


def write_line(writer: Writer, parts: Line) -> None:
    """Write a line, whatever is in it: what a backend says must not move the cursor."""
    for text, tone in parts:
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
        writer.write(shown, **_MARKUP[tone])
    writer.write("\n", flush=True)


def clock(seconds: float) -> str:
    """``0:07``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cut(parts: Line, style: Style) -> Line:
    """The parts, no longer than a line of the terminal."""
    columns, ellipsis = shutil.get_terminal_size().columns - 1, "…" if style.unicode else "~"
    kept: list[Part] = []
    for text, tone in parts:
        if len(text) > columns:
            return [*kept, (text[: max(0, columns - 1)] + ellipsis, tone)] if columns > 0 else kept
        kept.append((text, tone))
        columns -= len(text)
    return kept
