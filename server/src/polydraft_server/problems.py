"""Errors as OpenAI's API has them: a status, and ``{"error": {"message", "type", "param", "code"}}``.

The sentences are polydraft's own, with the API's field names in place of Python's arguments and without paths of this
machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polydraft.errors import (
    ContextLengthError,
    EngineCrashedError,
    EngineError,
    InvalidRequestError,
    ModelFormatError,
    OutOfMemoryError,
    PolydraftError,
    SessionClosedError,
    StructuredOutputError,
    SystemResourceError,
    UnsupportedError,
)

__all__ = ["ApiError", "Problem", "problem_of", "without_paths"]

log = logging.getLogger("polydraft.server")

_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "guided": "guided",
    "prompt": "prompt",
}
"""Arguments of ``Session.generate`` whose field in the API has another name; a request may have its own for them."""
_ARGUMENT = re.compile(r"`(\w+)")
# A path of two parts or more, not preceded by what makes it a part of a URL or of a word. All parts but the last may
# have blanks, and the last does not end with a full stop.
_PATH = re.compile(
    r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?(?:[/\\](?:[\w.@+-]+(?: [\w.@+-]+)*(?=[/\\])|[\w.@+-]*[\w@+-])){2,}[/\\]?"
)
_LONGEST = 2000
"""Characters of a message."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client gets it."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    """Seconds after which the client may try again; None: trying again would be of no use."""

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that tell clients, the official ones among them, whether to try again."""
        if self.retry_after is not None:
            return {"Retry-After": str(self.retry_after)}
        return {"x-should-retry": "false"} if self.status >= 500 or self.status == 408 else {}


class ApiError(Exception):
    """An error that the server itself raises."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem

    @classmethod
    def of(cls, status: int, message: str, hint: str = "", **fields: Any) -> ApiError:
        """From the sentences that say what is wrong and what to do."""
        if status == 400:
            fields = {"code": "invalid_value", **fields}
        return cls(Problem(status, f"{message} {hint}".strip(), **fields))


def problem_of(error: BaseException, fields: Mapping[str, str] = _FIELDS) -> Problem:
    """What a client is told of an error. What nobody expected is logged here, and told without its words.

    Args:
        error: The error.
        fields: Argument of ``Session.generate`` -> the request's field for it, where they differ.
    """
    fields = {**_FIELDS, **fields}
    if isinstance(error, ApiError):
        return error.problem
    if not isinstance(error, PolydraftError):
        log.error("A request failed unexpectedly.", exc_info=error)
        return Problem(500, "The server failed unexpectedly. Its log says more.", "server_error", "internal_error")
    message = _in_the_apis_words(str(error), fields)
    named = _named(_in_the_apis_words(error.message, fields))
    if isinstance(error, InvalidRequestError):
        param = fields.get(error.argument, error.argument) or named or fields["prompt"]
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else "invalid_value"
        return Problem(400, message, code=code, param=param)
    if isinstance(error, UnsupportedError):
        return Problem(400, message, code="unsupported", param=named or fields["prompt"])
    if isinstance(error, StructuredOutputError):
        return Problem(400, message, code="structured_output_failed", param=fields["guided"])
    if isinstance(error, ModelFormatError):  # a chat template that these messages break or that takes too long
        return Problem(400, message, code="chat_template_failed", param=fields["prompt"])
    if isinstance(error, EngineCrashedError | SessionClosedError):
        # Its last words are the log's: they may hold anything.
        log.error("The engine is lost: %s", error)
        message = "The engine has ended unexpectedly, and is being loaded again. Try again."
        return Problem(503, message, "server_error", "engine_crashed", retry_after=5)
    if isinstance(error, OutOfMemoryError | SystemResourceError):
        log.error("A request failed: %s", error)
        return Problem(503, message, "server_error", "out_of_resources", retry_after=5)
    log.error("A request failed: %s", error, exc_info=error)
    code = "engine_error" if isinstance(error, EngineError) else "internal_error"
    return Problem(500, message, "server_error", code)


def _named(sentence: str) -> str | None:
    """The field that a sentence names first."""
    found = _ARGUMENT.search(sentence)
    return found[1] if found else None


def _in_the_apis_words(sentence: str, fields: Mapping[str, str]) -> str:
    return without_paths(_ARGUMENT.sub(lambda found: f"`{fields.get(found[1], found[1])}", sentence[:_LONGEST]))


def without_paths(text: str) -> str:
    """The text without absolute paths, which are this machine's; URLs stay.

    >>> without_paths("/srv/models/gemma/config.json cannot be read; see https://example.org/a/b.")
    '<path> cannot be read; see https://example.org/a/b.'
    """
    return _PATH.sub("<path>", text)
