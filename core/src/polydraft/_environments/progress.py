"""How an installation is told: on a terminal one line that changes, elsewhere a line for each step."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from polydraft._presentable import presentable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.status import Status

__all__ = ["Progress", "showing_progress"]

_log = logging.getLogger("polydraft.engines")


class Progress:
    """Tells the steps of an installation to the log ``polydraft.engines``, and to a stream if there is one."""

    def __init__(self, stream: TextIO | None, status: Status | None) -> None:
        self._stream = stream
        self._status = status
        self._step = ""
        self._began = time.monotonic()

    def note(self, text: str) -> None:
        """A sentence that stays visible."""
        _log.info("%s", text)
        if self._status is not None:
            self._status.console.print(presentable(text))
        elif self._stream is not None:
            print(presentable(text), file=self._stream, flush=True)

    def step(self, number: int, count: int, what: str) -> None:
        """A step begins."""
        self._step = f"[{number}/{count}] {what}"
        if self._status is None:
            self.note(self._step)
        else:
            _log.info("%s", self._step)
            self._show("")

    def line(self, text: str) -> None:
        """A line that the running command prints."""
        if self._status is not None:
            self._show(text)

    def _show(self, text: str) -> None:
        assert self._status is not None
        seconds = int(time.monotonic() - self._began)
        shown = f"{self._step}, {seconds // 60}:{seconds % 60:02d}  {text.strip()}"
        # One line, besides the spinner and its blank.
        self._status.update(presentable(shown)[: self._status.console.width - 2].replace("[", r"\["))


@contextmanager
def showing_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Progress for the ``with`` block, on standard error or another stream; only logged if the stream is closed."""
    shown = sys.stderr if stream is None else stream
    if shown is None or shown.closed:
        yield Progress(None, None)
    elif not shown.isatty():
        yield Progress(shown, None)
    else:
        from rich.console import Console

        console = Console(file=shown, highlight=False, emoji=False, markup=True)
        with console.status("") as status:
            yield Progress(shown, status)
