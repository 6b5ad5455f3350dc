r"""Values as models write them in tool calls: JSON, and Gemma 4's dialect with bare keys and a token as quotation mark.

``{city:<|"|>São Paulo<|"|>,days:3}``. Standard JSON strings and Python's ``None``, ``True`` and ``False`` are read,
too: models write them, and nothing else could be meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

__all__ = ["QUOTES", "StringFollower", "lax_json", "map_texts", "strict_json", "value_at"]

QUOTES = (('<|"|>', '<|"|>'),)
"""Gemma 4's opening and closing quotation marks, as text."""

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?", re.ASCII)
_FRACTION = re.compile(r"[.eE]")
_WORD = re.compile(r"[^,\]}\s]+")
_BARE_KEY = re.compile(r'[^{\[,\]}"]*')
_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_STRINGS = json.JSONDecoder(strict=False)  # models write line breaks into strings as they are


class StringFollower:
    """Says whether the text so far ends inside a string: JSON's, or one between quotation marks of one character each.

    Args:
        quotes: Opening quotation mark -> closing one.
    """

    def __init__(self, quotes: Mapping[str, str]) -> None:
        self._quotes = {**quotes, '"': '"'}
        self._closing: str | None = None
        self._escaped = False

    @property
    def inside(self) -> bool:
        """Whether a string is open."""
        return self._closing is not None

    def feed(self, text: str) -> None:
        """Follow more text."""
        for character in text:
            if self._escaped:
                self._escaped = False
            elif self._closing is None:
                self._closing = self._quotes.get(character)
            elif character == self._closing:
                self._closing = None
            elif character == "\\":
                self._escaped = self._closing == '"'


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested data with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_texts(inner, change) for inner in value]
    return value


def strict_json(text: str) -> Any:
    """Standard JSON, with control characters allowed in strings.

    Raises:
        ValueError: It is not, or holds a number that is not finite.
        RecursionError: It nests too deeply.
    """
    return json.loads(text, strict=False, parse_constant=_no_constant, parse_float=_finite)


def lax_json(text: str, quotes: Sequence[tuple[str, str]] = QUOTES) -> Any:
    """The value that the whole text is, with bare keys and strings between ``quotes``.

    Raises:
        ValueError: It is none.
        IndexError: It is cut off.
        RecursionError: It nests too deeply.
    """
    value, end = value_at(text, 0, quotes)
    if text[end:].strip():
        raise ValueError(text[end:])
    return value


def value_at(text: str, at: int, quotes: Sequence[tuple[str, str]] = QUOTES) -> tuple[Any, int]:
    """The value that starts at ``at``, and where it ends. Raises what ``lax_json`` raises."""
    at = _skip(text, at)
    for opening, closing in quotes:
        if text.startswith(opening, at):
            end = text.index(closing, at + len(opening))
            return text[at + len(opening) : end], end + len(closing)
    if text[at] == '"':
        return _STRINGS.raw_decode(text, at)
    if text[at] == "{":
        return _object(text, at + 1, quotes)
    if text[at] == "[":
        return _array(text, at + 1, quotes)
    match = _WORD.match(text, at)
    if match is None:
        raise ValueError(text[at:])
    return _scalar(match[0]), match.end()


def _scalar(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if not _NUMBER.fullmatch(word):  # float() accepts nan, infinity and 1_000, too
        raise ValueError(word)
    return _finite(word) if _FRACTION.search(word) else int(word)


def _finite(word: str) -> float:
    number = float(word)
    # 1e999 overflows to infinity, for which JSON has no form.
    if number in (float("inf"), float("-inf")):
        raise ValueError(word)
    return number


def _no_constant(word: str) -> NoReturn:
    raise ValueError(word)  # NaN and Infinity are not JSON


def _object(text: str, at: int, quotes: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    at = _skip(text, at)
    while text[at] != "}":
        key, at = _key(text, at, quotes)
        found[key], at = value_at(text, at, quotes)
        at = _separator(text, at, "}")
    return found, at + 1


def _key(text: str, at: int, quotes: Sequence[tuple[str, str]]) -> tuple[str, int]:
    """A key, and where the colon after it ends."""
    if text[at] == '"' or any(text.startswith(opening, at) for opening, _ in quotes):
        key, at = value_at(text, at, quotes)
        at = _skip(text, at)
        if text[at] != ":":
            raise ValueError(text[at:])
        return key, at + 1
    match = _BARE_KEY.match(text, at)
    assert match is not None
    bare = match[0]
    for opening, _ in quotes:
        bare = bare.partition(opening)[0]
    # The last colon: a bare key may hold some, a number or a constant holds none.
    colon = bare.rindex(":")
    return bare[:colon].strip(), at + colon + 1


def _array(text: str, at: int, quotes: Sequence[tuple[str, str]]) -> tuple[list[Any], int]:
    found: list[Any] = []
    at = _skip(text, at)
    while text[at] != "]":
        item, at = value_at(text, at, quotes)
        found.append(item)
        at = _separator(text, at, "]")
    return found, at + 1


def _separator(text: str, at: int, closing: str) -> int:
    at = _skip(text, at)
    if text[at] == ",":
        return _skip(text, at + 1)
    if text[at] != closing:
        raise ValueError(text[at:])
    return at


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
