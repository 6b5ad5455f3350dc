"""The prompt, from one of the options or standard input."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from polydraft._cli.streams import is_terminal
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from pathlib import Path

    from polydraft.contract import Prompt

__all__ = ["read_prompt"]

_HOW = "Give --prompt TEXT, --prompt-file FILE, --prompt-token-ids 1,2,3, or text on standard input."


def read_prompt(
    text: str | None, file: Path | None, token_ids: str | None, *, chat: bool = False, system: str | None = None
) -> Prompt:
    """The prompt given by ``--prompt``, ``--prompt-file`` or ``--prompt-token-ids``, else standard input.

    With ``chat`` the text is the user's message of a chat, after ``system`` if that is given.

    Raises:
        InvalidRequestError: More than one is given, none is, it is empty, or it cannot be read.
    """
    options = {"--prompt": text, "--prompt-file": file, "--prompt-token-ids": token_ids}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} exclude one another.", "Give one of them.")
    if system is not None and not chat:
        raise InvalidRequestError("--system needs --chat.", "Add --chat, or put the text into the prompt.")
    if token_ids is not None:
        if chat:
            raise InvalidRequestError("--chat takes text, not token ids.", "Leave out --chat, or give --prompt.")
        return _parse_token_ids(token_ids)
    if text is None:
        text = _read_file(file) if file is not None and str(file) != "-" else _read_stdin()
    if not text:
        raise InvalidRequestError("The prompt is empty.", _HOW)
    if not chat:
        return text
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


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
    return [int(part) for part in parts]


def _read_file(path: Path) -> str:
    try:
        # Bytes: universal newlines would change the prompt.
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidRequestError(
            f"--prompt-file {path} cannot be read: {error.strerror or error}.", "Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"--prompt-file {path} is not UTF-8 text.", "Save it as UTF-8.") from error


def _read_stdin() -> str:
    if sys.stdin is None or is_terminal(sys.stdin):
        raise InvalidRequestError("There is no prompt.", _HOW)
    try:
        # Bytes, as for a file; a replaced sys.stdin may have no buffer.
        return sys.stdin.buffer.read().decode("utf-8") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequestError("Standard input is not UTF-8 text.", "Give the prompt as UTF-8.") from error
