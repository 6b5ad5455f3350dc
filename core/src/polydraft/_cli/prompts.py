"""The prompt, as an argument, from one of the options, or from standard input."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from polydraft._cli.streams import is_terminal
from polydraft.errors import InvalidRequestError
from polydraft.files import system_errors

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from polydraft.contract import Prompt

__all__ = ["given_text", "read_file", "read_prompt", "read_text"]

_LONGEST = 64 << 20
"""Bytes of a prompt's text that are read: several times what the longest context of any model holds."""
_DIGITS = 20
"""More digits than any token id; Python converts at most 4300."""
_HOW = "Give it as an argument, --prompt-file FILE, --prompt-token-ids 1,2,3, or text on standard input."


def read_prompt(
    text: str | None,
    file: Path | None,
    token_ids: str | None,
    *,
    argument: str | None = None,
    chat: bool = False,
    system: str | None = None,
) -> Prompt:
    """The prompt given as an argument, by ``--prompt``, ``--prompt-file`` or ``--prompt-token-ids``, else by stdin.

    With ``chat`` the text is the user's message of a chat, after ``system`` if that is given. Files and standard input
    are UTF-8: a byte order mark at the start is left out, and everything else, CRLF and NUL too, belongs to the prompt.

    Raises:
        InvalidRequestError: More than one is given, none is, it is empty, or it cannot be read.
    """
    options = {"PROMPT": argument, "--prompt": text, "--prompt-file": file, "--prompt-token-ids": token_ids}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} exclude one another.", "Give one of them.")
    if system is not None and not chat:
        raise InvalidRequestError("--system needs --chat.", "Add --chat, or put the text into the prompt.")
    if token_ids is not None:
        if chat:
            raise InvalidRequestError("--chat takes text, not token ids.", "Leave out --chat, or give --prompt.")
        return _parse_token_ids(token_ids)
    text = argument if text is None else text
    if text is None:
        text = read_file(file) if file is not None and str(file) != "-" else _read_stdin()
    text = given_text("The prompt", text)
    if not text:
        raise InvalidRequestError("The prompt is empty.", _HOW)
    if not chat:
        return text
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": given_text("--system", system)}, *messages]


def given_text(option: str, text: str) -> str:
    """An option's text as UTF-8, whatever the locale: Python keeps bytes that the locale cannot decode as surrogates.

    Raises:
        InvalidRequestError: It is not UTF-8.
    """
    try:
        return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise InvalidRequestError(f"{option} is not UTF-8 text.", "Give it as UTF-8.") from error


def _parse_token_ids(text: str) -> list[int]:
    """Token ids from ``1,2,3``."""
    parts = [part.strip() for part in text.split(",")]
    # isdecimal alone takes digits of other scripts too.
    wrong = next((part for part in parts if not (part.isascii() and part.isdecimal())), None)
    if wrong is not None:
        what = f"{wrong!r} is not a token id" if text.strip() else "it is empty"
        raise InvalidRequestError(
            f"--prompt-token-ids cannot be read: {what}.", "Give whole numbers from 0 on, separated by commas: 1,2,3."
        )
    long = next((part for part in parts if len(part) > _DIGITS), None)
    if long is not None:
        raise InvalidRequestError(
            f"--prompt-token-ids holds a number of {len(long)} digits, which is not a token of any model.",
            "Leave it out.",
        )
    return [int(part) for part in parts]


def read_file(path: Path, option: str = "--prompt-file") -> str:
    """The text of a file that an option names.

    Raises:
        InvalidRequestError: It cannot be read, is not UTF-8, or is longer than any prompt.
    """
    try:
        # Not only regular files: ``<(command)`` and /dev/stdin are pipes.
        with system_errors(f"{option} {path} cannot be read"), path.open("rb") as file:
            return read_text(file, f"{option} {path}")
    except OSError as error:
        raise InvalidRequestError(
            f"{option} {path} cannot be read: {error.strerror or error}.", "Check the path."
        ) from error


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.closed or is_terminal(sys.stdin):
        raise InvalidRequestError("There is no prompt.", _HOW)
    try:
        # A replaced sys.stdin may have no buffer.
        return read_text(sys.stdin.buffer, "Standard input") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    except OSError as error:
        with system_errors("Standard input cannot be read"):
            raise
        raise InvalidRequestError(f"Standard input cannot be read: {error.strerror or error}.", _HOW) from error


def read_text(file: BinaryIO, what: str, *, line: bool = False) -> str:
    """The text of a file, or its next line; errors call it ``what``.

    Raises:
        InvalidRequestError: It is not UTF-8, or longer than any prompt.
    """
    # Bytes: universal newlines would change the prompt. Bounded: it may be a pipe or a device that does not end.
    data = (file.readline if line else file.read)(_LONGEST + 1) or b""
    if len(data) > _LONGEST:
        raise InvalidRequestError(f"{what} holds more than {_LONGEST >> 20} MiB of text.", "Give a shorter prompt.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        form = "UTF-16 or UTF-32 text, not UTF-8" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "not UTF-8 text"
        raise InvalidRequestError(f"{what} is {form}.", "Save or give it as UTF-8.") from error
