"""Errors as the command line reports them: one line, a hint, an exit code. A traceback only with ``--debug``."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any, TextIO

from polydraft._argument_names import did_you_mean_argument
from polydraft._flags import FLAGS, in_flags
from polydraft._presentable import presentable
from polydraft.errors import InvalidRequestError, PolydraftError
from polydraft.files import system_error
from polydraft.secrets import MASK, names_a_secret

__all__ = ["BROKEN_PIPE", "FAILURE", "INTERRUPTED", "SUCCESS", "USAGE", "describe", "report", "show_warnings"]

SUCCESS = 0
FAILURE = 1
USAGE = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE, as shells report a program whose reader went away."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as the command line shows it."""

    message: str
    hint: str
    exit_code: int


def describe(error: Exception) -> Problem:
    """The sentence, the hint and the exit code of an error: 2 for a wrong request, 1 for everything else."""
    if isinstance(error, PolydraftError):
        message, hint = (in_flags(_one_line(text)) for text in (error.message, error.hint))
        if not isinstance(error, InvalidRequestError):
            return Problem(message, hint, FAILURE)
        flag = FLAGS[error.argument][0] if error.argument in FLAGS else ""
        named = not flag or f"`{flag}" in message
        return Problem(message if named else f"{flag}: {message}", hint, USAGE)
    # Usage errors of typer; their class is click's or, in later versions, typer's own.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "polydraft"
        message = _without_secrets(_one_line(error.format_message()))
        hint = f"{_meant(error, context, message)} `{command} --help` lists what it takes.".strip()
        return Problem(message, hint, USAGE)
    if refused := system_error(error):
        return describe(refused)
    if isinstance(error, OSError) and error.errno is not None:
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
        return Problem(
            f"The operating system refused: {_one_line(what)}.", "Check the path and its permissions.", FAILURE
        )
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Problem(
        f"An unexpected error: {_one_line(what)}",
        "Run it again with --debug for the traceback, and report it.",
        FAILURE,
    )


def _meant(error: Exception, context: Any, message: str) -> str:
    """``Did you mean ...?`` for an option that a command does not have, unless the message says so already."""
    option = getattr(error, "option_name", None)
    if not option or "Did you mean" in message or context is None:
        return ""
    flags = {flag for parameter in context.command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    if option in flags:  # it is not unknown, but lacks its value
        return ""
    known = [argument for argument, own in FLAGS.items() if own[0] in flags]
    return in_flags(did_you_mean_argument(option, known))


def report(error: Exception, *, debug: bool) -> int:
    """Write an error to standard error, with its traceback if ``debug``, and return the exit code."""
    problem = describe(error)
    with contextlib.suppress(OSError):  # standard error may be full or closed, too: the exit code still tells
        if debug:
            lines = "".join(traceback.format_exception(error))
            print(presentable(_without_secrets(lines)), end="", file=sys.stderr)
        print(f"Error: {problem.message}", file=sys.stderr)
        if problem.hint:
            print(f"Hint: {problem.hint}", file=sys.stderr)
    return problem.exit_code


def show_warnings() -> None:
    """Let warnings be one line on standard error, without the source line; those of others keep their wording."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = _one_line(str(message))
        ours = category.__module__.partition(".")[0] == "polydraft"
        print(f"Warning: {in_flags(text) if ours else text}", file=file or sys.stderr)

    warnings.showwarning = show


_ASSIGNED = re.compile(r"([\w.-]+)=[^\s)]+")
"""``NAME=VALUE`` among words that a command does not take."""


def _without_secrets(text: str) -> str:
    return _ASSIGNED.sub(lambda found: f"{found[1]}={MASK}" if names_a_secret(found[1]) else found[0], text)


def _one_line(text: str) -> str:
    return presentable(" ".join(text.split()))
