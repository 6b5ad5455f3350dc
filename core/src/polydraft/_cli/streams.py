"""Where output goes: the answer to standard output, everything else to standard error.

Engines print to standard output, and C libraries write straight to file descriptor 1. A command therefore takes
descriptor 1 for itself before it loads anything, and all other output goes to standard error.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING, TextIO

from polydraft._presentable import presentable
from polydraft.errors import PolydraftError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

__all__ = ["abandon_output", "claim_output", "console_for", "diagnostics", "is_terminal", "output_closed"]

_STDOUT, _STDERR = 1, 2
_NO_LIMIT = 10_000


@cache
def claim_output() -> TextIO:
    """The process's standard output, reserved for the command; claimed once.

    From now on file descriptor 1 and ``sys.stdout`` lead to standard error, until the process ends: libraries may
    buffer what they print and write it at exit.

    Raises:
        PolydraftError: Standard output is closed.
    """
    # What is buffered was meant for the old descriptor.
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        os.fstat(_STDERR)
    except OSError:  # closed: its number must not be given to the copy made below
        null = os.open(os.devnull, os.O_WRONLY)
        if null != _STDERR:
            os.dup2(null, _STDERR)
            os.close(null)
    try:
        saved = os.dup(_STDOUT)
    except OSError as error:
        raise output_closed() from error
    # For C libraries; ``sys.stdout`` below is for Python's.
    os.dup2(_STDERR, _STDOUT)
    if sys.stderr is not None:
        sys.stdout = sys.stderr
    # Lone surrogates cannot be written as UTF-8; an escape is better than a crash at the end of a long answer.
    # newline="": line ends stay as the model wrote them, on Windows, too.
    return os.fdopen(saved, "w", encoding="utf-8", errors="backslashreplace", newline="")


def output_closed() -> PolydraftError:
    """The error of a command that has nowhere to write its answer."""
    return PolydraftError("Standard output is closed.", "Redirect it to a terminal, a file or a pipe.")


def abandon_output() -> None:
    """Discard what is still to be flushed to standard output: its reader is gone, or its disk is full."""
    try:
        stream = claim_output()
    except PolydraftError:
        return  # it is closed
    null = os.open(os.devnull, os.O_WRONLY)
    # The interpreter flushes at exit: into the null device, so that the pipe's error does not come again.
    os.dup2(null, stream.fileno())
    os.close(null)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def console_for(stream: TextIO) -> Console:
    """A rich console with colours as ``NO_COLOR``, ``FORCE_COLOR`` and the terminal say; in files no line is folded."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        """Shows text as it is: names from files control no terminal, and hold no markup.

        Raises on a broken pipe, where rich would redirect ``sys.stdout`` and exit.
        """

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            if isinstance(renderable, Text) and presentable(renderable.plain) != renderable.plain:
                renderable = renderable.copy()
                renderable.plain = presentable(renderable.plain)  # here, so that it is folded as it is shown
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=presentable(segment.text))

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # rich takes files to be 80 columns wide, and would fold their lines.
    width = None if is_terminal(stream) or "COLUMNS" in os.environ else _NO_LIMIT
    return PlainConsole(file=stream, highlight=False, markup=False, emoji=False, width=width)


def diagnostics() -> Console:
    """A console on standard error."""
    return console_for(sys.stderr)
