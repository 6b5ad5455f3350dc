"""Messages of a chat: from a terminal with line editing and a history, or from a pipe, a line each."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from polydraft._cli.prompts import given_text, read_text
from polydraft._cli.streams import is_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["history_file", "read_message", "with_history"]

QUOTES = '"""'
"""Begins and ends a message of several lines."""
_MOST = 1000
"""Messages that the history keeps."""


def history_file() -> Path:
    """Where messages that were typed are kept, for the arrow keys of the next chat."""
    from platformdirs import user_state_path

    return user_state_path("polydraft") / "chat_history"


@contextlib.contextmanager
def with_history() -> Iterator[None]:
    """Line editing, where this build of Python has it; at a terminal with the messages of earlier chats."""
    if not is_terminal(sys.stdin):
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    file = history_file()
    with contextlib.suppress(OSError):  # there is none yet, or it is not to be read
        readline.read_history_file(file)
    readline.set_history_length(_MOST)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing depends on it
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


def read_message(interrupted: str) -> str | None:
    """The next message, stripped; None at the end of input.

    Lines between three quotes are one message, and so are lines that end with a backslash and what follows them.

    Args:
        interrupted: What is said to Ctrl-C at a terminal.

    Raises:
        InvalidRequestError: It is not UTF-8, or too long.
    """
    line = _line("> ", interrupted)
    if line is None:
        return None
    text = line.strip()
    if text.startswith(QUOTES):
        return _until_quotes(text.removeprefix(QUOTES), interrupted)
    while text.endswith("\\") and (more := _line(". ", interrupted)) is not None:
        text = f"{text[:-1].rstrip()}\n{more.strip()}"
    return text


def _until_quotes(text: str, interrupted: str) -> str:
    lines = [text]
    while not lines[-1].rstrip().endswith(QUOTES) and (more := _line(". ", interrupted)) is not None:
        lines.append(more.rstrip("\r\n"))
    return "\n".join(lines).strip().removesuffix(QUOTES).strip()


def _line(prompt: str, interrupted: str) -> str | None:
    if not is_terminal(sys.stdin):
        if sys.stdin is None or sys.stdin.closed:
            return None
        # Bytes: a pipe is UTF-8 whatever the locale. A replaced sys.stdin may have no buffer.
        whole = hasattr(sys.stdin, "buffer")
        return (read_text(sys.stdin.buffer, "The message", line=True) if whole else sys.stdin.readline()) or None
    while True:
        try:
            with _line_editing():
                return given_text("The message", input(prompt))
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """``input`` edits lines only where ``sys.stdout`` is over descriptor 1, which leads to standard error by now."""
    with (
        open(1, "w", encoding=sys.stdin.encoding, errors="backslashreplace", closefd=False) as stream,
        contextlib.redirect_stdout(stream),
    ):
        yield
