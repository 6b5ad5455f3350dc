"""A file of requests in OpenAI's batch format: checked as a whole before any work, then read line by line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polydraft.errors import InvalidRequestError, PolydraftError
from polydraft.files import open_regular, parse_json, system_error

__all__ = ["ENDPOINTS", "RequestLine", "RequestsFile", "digest"]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
_LONGEST_LINE = 64 << 20
"""Bytes. No context takes more; a file without line ends would fill the memory."""
_TOLD = 5
"""Bad lines that an error shows."""


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One request of the file."""

    custom_id: str
    url: str
    body: str
    """JSON."""
    digest: str
    """Of what is asked for, and of the run's model and settings."""


class _BadLineError(Exception):
    """Why a line is no request, in words that follow ``Line 3``."""


class RequestsFile:
    """The requests of a file.

    Args:
        path: The file, one JSON object a line; empty lines do not count.
        run: What else decides the answers: the model's name and the default settings. It goes into the digests.

    Raises:
        InvalidRequestError: It cannot be read, has no request, or a line is not one. All lines are looked at.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self._run = json.dumps(run, sort_keys=True, default=repr)
        self.digests: dict[bytes, str] = {}
        """``digest(custom_id)`` -> the request's digest. All that is remembered of 100,000 lines takes some 40 MB."""
        lines: dict[bytes, int] = {}
        bad: list[str] = []
        count = 0
        for number, raw in self._lines():
            try:
                line = self._parsed(raw)
                name = digest(line.custom_id)
                if name in lines:
                    raise _BadLineError(f"has the `custom_id` of line {lines[name]}, {_short(line.custom_id)}")
            except _BadLineError as error:
                count += 1
                if count <= _TOLD:
                    bad.append(f"Line {number} {error}.")
                continue
            lines[name] = number
            self.digests[name] = line.digest
        if count:
            more = f" {count - len(bad)} more lines are not usable." if count > len(bad) else ""
            raise InvalidRequestError(
                f"{path} is not a batch of requests. {' '.join(bad)}{more}",
                'Each line is an object such as {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", '
                '"body": {"messages": [...]}}. Nothing was run.',
            )
        if not lines:
            raise InvalidRequestError(f"{path} has no requests.", "Give a file with one request a line.")

    def __len__(self) -> int:
        return len(self.digests)

    def without(self, done: Mapping[bytes, Any]) -> Iterator[RequestLine]:
        """The requests whose ``digest(custom_id)`` is not in ``done``, in the file's order.

        Raises:
            PolydraftError: The file has changed since it was checked.
        """
        for number, raw in self._lines():
            try:
                line = self._parsed(raw)
            except _BadLineError:
                line = None
            if line is None or self.digests.get(digest(line.custom_id)) != line.digest:
                raise PolydraftError(
                    f"{self.path} was changed while it was being worked on, at line {number}.",
                    "Answers so far are kept. Leave the file alone, and run the same command again.",
                )
            if digest(line.custom_id) not in done:
                yield line

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbers from 1 and contents of lines that are not empty; of one that is too long, only its beginning."""
        try:
            with open_regular(self.path) as file:
                number = 0
                while raw := file.readline(_LONGEST_LINE + 1):
                    number += 1
                    if number == 1:
                        raw = raw.removeprefix(b"\xef\xbb\xbf")  # some editors begin UTF-8 with it
                    if not raw.isspace():
                        yield number, raw
                    while len(raw) > _LONGEST_LINE and not raw.endswith(b"\n"):
                        raw = file.readline(_LONGEST_LINE + 1)
        except OSError as error:
            raise system_error(error, f"{self.path} cannot be read") or InvalidRequestError(
                f"{self.path} cannot be read: {error.strerror or error}.", "Give a file of requests, one a line."
            ) from error

    def _parsed(self, raw: bytes) -> RequestLine:
        if len(raw) > _LONGEST_LINE:
            raise _BadLineError(f"is longer than {_LONGEST_LINE >> 20} MiB")
        try:
            found = parse_json(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise _BadLineError("is not UTF-8") from None
        except json.JSONDecodeError as error:
            raise _BadLineError(f"is not JSON ({error.msg} at column {error.colno})") from None
        except ValueError as error:
            raise _BadLineError(f"is not usable as JSON: {error}") from None
        if not isinstance(found, dict):
            raise _BadLineError("is not a JSON object")
        name, url, body = found.get("custom_id"), found.get("url"), found.get("body")
        if not isinstance(name, str) or not name:
            raise _BadLineError("has no `custom_id`, or it is not text")
        if found.get("method") != "POST":
            raise _BadLineError('has another `method` than "POST"')
        if url not in ENDPOINTS:
            close = difflib.get_close_matches(str(url)[:100], ENDPOINTS, n=1)
            meant = f" (did you mean {close[0]}?)" if close else f"; there are {' and '.join(ENDPOINTS)}"
            raise _BadLineError(f"has the `url` {_short(url)}{meant}")
        if not isinstance(body, dict):
            raise _BadLineError("has no `body`, or it is not an object")
        text = json.dumps(body)
        return RequestLine(name, url, text, digest(f"{self._run}{url}{text}").hex())


def digest(text: str) -> bytes:
    """16 bytes in place of a text of any length."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
