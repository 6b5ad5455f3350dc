"""The prompts that are measured: the built-in set, by class, or the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from polydraft.contract.records import Record
from polydraft.errors import InvalidRequestError
from polydraft.files import parse_json, read_bytes, system_errors

__all__ = ["CLASSES", "MeasuredPrompt", "built_in_prompts", "given_prompts", "read_prompts"]

CLASSES = ("code", "prose", "chat", "list")
"""Of the built-in prompts: drafters do well on some and badly on others."""
_OWN = "yours"
"""Class of the user's prompts, unless they name one."""
_SEPARATOR = "---"
_FORMS = (
    "Give plain text, with lines of --- between prompts; or .json or .jsonl: a list (or lines) of texts, chats (lists "
    "of messages), or objects with `prompt` and `class`."
)


class MeasuredPrompt(Record):
    """One prompt, as ``Session.generate`` takes it."""

    kind: str
    prompt: str | tuple[dict[str, Any], ...] | tuple[int, ...]
    raw: str = ""
    """What a chat is for a model without a chat template; empty: an error then."""


def built_in_prompts() -> tuple[MeasuredPrompt, ...]:
    """Two of each class, the classes in turn."""
    found = []
    for number in (1, 2):
        for kind in CLASSES:
            text = files(__package__).joinpath("texts", f"{kind}-{number}.txt").read_text(encoding="utf-8")
            if kind == "chat":
                found.append(MeasuredPrompt(kind=kind, prompt=({"role": "user", "content": text},), raw=text))
            else:
                found.append(MeasuredPrompt(kind=kind, prompt=text))
    return tuple(found)


def read_prompts(path: Path) -> tuple[MeasuredPrompt, ...]:
    """Prompts from a file, by its suffix.

    Raises:
        InvalidRequestError: It cannot be read, or holds no prompts of a known form.
    """
    try:
        with system_errors(f"{path} cannot be read"):
            text = read_bytes(path).decode("utf-8-sig")
        if path.suffix.lower() == ".json":
            return given_prompts(parse_json(text))
        if path.suffix.lower() == ".jsonl":
            return given_prompts(_lines(text))
    except OSError as error:
        raise _wrong(f"The file of prompts {path} cannot be read: {error.strerror or error}.", "Check it.") from error
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start}"
        raise _wrong(f"The file of prompts {path} is not UTF-8: {why}.", "Save it as UTF-8.") from error
    except ValueError as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise _wrong(f"The file of prompts {path} cannot be read: {error}.", _FORMS) from error
    parts = [""]
    for line in text.splitlines(keepends=True):
        if line.strip() == _SEPARATOR:
            parts.append("")
        else:
            parts[-1] += line
    # The newline before a separator, or at the end of the file, is not the prompt's.
    return given_prompts([part.removesuffix("\n").removesuffix("\r") for part in parts if part.strip()])


def _lines(text: str) -> list[Any]:
    """The values of JSON lines, which end with a newline alone: texts may hold the other ends of lines."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(parse_json(line))
            except ValueError as error:
                why = str(error)
                if isinstance(error, json.JSONDecodeError):  # its own line number would be 1
                    why = f"{error.msg} at column {error.colno}"
                raise ValueError(f"line {number} is no JSON: {why}") from error
    return found


def given_prompts(given: Any) -> tuple[MeasuredPrompt, ...]:
    """Prompts from a list, or from a mapping of classes to lists.

    Raises:
        InvalidRequestError: There are none, or one is not a prompt.
    """
    if isinstance(given, Mapping):
        listed = [(str(kind), one) for kind, group in given.items() for one in _listed(group)]
    else:
        listed = [_with_class(one) for one in _listed(given)]
    if not listed:
        raise _wrong("There are no prompts.", _FORMS)
    return tuple(_measured(kind, one, number) for number, (kind, one) in enumerate(listed, 1))


def _measured(kind: str, given: Any, number: int) -> MeasuredPrompt:
    found = MeasuredPrompt(kind=kind, prompt=_checked(given, number))
    try:
        found.model_dump_json()  # as the processes of engines get it
    except ValueError as error:
        what = str(error).removeprefix("Error serializing to JSON: ")
        message = f"Prompt {number} cannot be written as JSON: {what}."
        raise _wrong(message, "Give valid Unicode, and plain data.") from None
    return found


def _listed(given: Any) -> Sequence[Any]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise _wrong("The prompts are not a list.", _FORMS)
    return given


def _with_class(given: Any) -> tuple[str, Any]:
    if isinstance(given, Mapping) and "prompt" in given and set(given) <= {"prompt", "class"}:
        return str(given.get("class") or _OWN), given["prompt"]
    return _OWN, given


def _checked(given: Any, number: int) -> Any:
    if isinstance(given, str) and given:
        return given
    if isinstance(given, Sequence) and not isinstance(given, str | bytes) and len(given):
        if all(isinstance(one, Mapping) and all(isinstance(name, str) for name in one) for one in given):
            return tuple(dict(one) for one in given)
        if all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in given):
            return tuple(given)
    if given == "":
        raise _wrong(f"Prompt {number} is an empty text.", "Leave it out.")
    raise _wrong(f"Prompt {number} is not a text, a chat or a list of token ids.", _FORMS)


def _wrong(message: str, hint: str) -> InvalidRequestError:
    return InvalidRequestError(message, hint, argument="prompts")
