"""What is being waited for, on standard error: one line that changes on a terminal, elsewhere a line now and then.

What goes on inside is told by the log ``polydraft.progress``, in this process and in workers: each of its records says
what begins, such as "Downloading org/name". One with ``shows_itself`` has bars or a question of its own on the
terminal, over which no line is written. What ``polydraft.progress.memory`` tells stays: the memory that a pair needs.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from polydraft._cli.streams import is_terminal
from polydraft._presentable import presentable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polydraft._cli.render.answer import AnswerView
    from polydraft._session.session import Session
    from polydraft.contract import Chunk

__all__ = ["Waiting", "waiting_for", "waiting_for_answer"]

_TICK = 0.5
"""Seconds between changes of the line on a terminal."""
_LINE_EVERY = 8.0
"""Seconds between lines where standard error is no terminal."""
_ERASE = "\r\x1b[2K"


class Waiting(logging.Handler):
    """Shows a step and its seconds until it is closed; a thread of its own writes.

    Args:
        what: The first step.
    """

    def __init__(self, what: str) -> None:
        super().__init__(logging.INFO)
        self._step = what
        self._hidden = False
        self._left: Callable[[], float] | None = None
        self._began = time.monotonic()
        self.on_terminal = is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
        self._ended = threading.Event()
        self._drawing = threading.Lock()
        self._drawn = False
        self._thread = threading.Thread(target=self._run, name="polydraft-waiting", daemon=True)
        self._show()
        if sys.stderr is not None:
            self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """A step begins; or what the pair needs is said, which stays."""
        if record.name == "polydraft.progress.memory":
            self.line(f"{record.getMessage()}.")
        else:
            self.step(record.getMessage(), hidden=getattr(record, "shows_itself", False))

    def step(self, what: str, left: Callable[[], float] | None = None, *, hidden: bool = False) -> None:
        """Another step begins; ``left`` gives the seconds that are left at most, where they are known."""
        self._step, self._left, self._hidden = what, left, hidden
        self._show()

    def line(self, text: str) -> None:
        """Write a line that stays."""
        with self._drawing, suppress(OSError, ValueError):  # standard error may be full or closed
            self._erase()
            print(presentable(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop, and erase the line. May be called twice."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._drawing, suppress(OSError, ValueError):
            self._erase()
        super().close()

    def _run(self) -> None:
        while not self._ended.wait(_TICK if self.on_terminal else _LINE_EVERY):
            if self.on_terminal:
                self._show()
            else:
                self.line(self._text())

    def _show(self) -> None:
        if not self.on_terminal or self._ended.is_set():
            return
        with self._drawing, suppress(OSError, ValueError):
            if self._hidden:
                self._erase()
            else:
                width = shutil.get_terminal_size().columns - 1
                print(f"{_ERASE}{presentable(self._text())[:width]}", end="\r", file=sys.stderr, flush=True)
                self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            print(_ERASE, end="", file=sys.stderr, flush=True)
            self._drawn = False

    def _text(self) -> str:
        seconds = int(time.monotonic() - self._began)
        so_far = f" {seconds // 60}:{seconds % 60:02d}" if seconds else ""
        left = f", at most {max(0, round(self._left()))} s left" if self._left else ""
        return f"{self._step} ...{so_far}{left}"


@contextmanager
def waiting_for(what: str) -> Iterator[Waiting]:
    """Show what is being waited for, and the steps that the log ``polydraft.progress`` tells."""
    logger = logging.getLogger("polydraft.progress")
    shown, before = Waiting(what), logger.level
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    try:
        yield shown
    finally:
        logger.removeHandler(shown)
        logger.setLevel(before)
        shown.close()


@contextmanager
def waiting_for_answer(view: AnswerView | None, session: Session) -> Iterator[Callable[[Chunk], None]]:
    """Gives a function that shows chunks; until the first one, and where none shows on a terminal, what is waited for.

    Where standard error is no terminal, both may be one file: no line comes once the answer has begun.

    Args:
        view: Where chunks are shown; None: nowhere.
        session: Whose answer it is: its engine may give text, not tokens.
    """
    tokens, unit = 0, "characters" if getattr(session.tokenizer, "text_only", False) else "tokens"
    with waiting_for("Reading the prompt") as waiting:

        def show(chunk: Chunk) -> None:
            nonlocal tokens
            tokens += len(chunk.token_ids or ())
            if view is not None and (view.on_terminal or (chunk.text and not waiting.on_terminal)):
                waiting.close()
            else:
                waiting.step(f"{tokens} {unit}" if chunk.token_ids is not None else "Generating")
            if view is not None:
                view.chunk(chunk)

        yield show
