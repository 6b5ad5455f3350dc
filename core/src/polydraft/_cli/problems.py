"""Errors as the command line tells them: one line, a hint, an exit code. A traceback only with ``--debug``."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import TextIO

from polydraft.errors import InvalidRequestError, PolydraftError

__all__ = [
    "BROKEN_PIPE",
    "FAILURE",
    "INTERRUPTED",
    "SUCCESS",
    "USAGE",
    "Problem",
    "describe",
    "in_options",
    "show_warnings",
    "tell",
]

SUCCESS = 0
FAILURE = 1
USAGE = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE, as shells report a program whose reader went away."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is told of an error."""

    message: str
    hint: str
    exit_code: int


def describe(error: Exception) -> Problem:
    """The sentence, the hint and the exit code of an error: 2 for a wrong request, 1 for everything else."""
    if isinstance(error, PolydraftError):
        code = USAGE if isinstance(error, InvalidRequestError) else FAILURE
        return Problem(in_options(_one_line(error.message)), in_options(_one_line(error.hint)), code)
    # Usage errors of typer; their class lives in click or in typer itself, as the version has it.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "polydraft"
        return Problem(_one_line(error.format_message()), f"`{command} --help` lists what it takes.", USAGE)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Problem(
        f"An unexpected error: {_one_line(what)}",
        "Run it again with --debug for the traceback, and report it.",
        FAILURE,
    )


def tell(error: Exception, *, debug: bool, stream: TextIO | None = None) -> int:
    """Write an error to standard error.

    Args:
        error: The error.
        debug: With the whole traceback.
        stream: Where to write; None: standard error.

    Returns:
        The exit code.
    """
    stream = sys.stderr if stream is None else stream
    problem = describe(error)
    if debug:
        traceback.print_exception(error, file=stream)
    print(f"Error: {problem.message}", file=stream)
    if problem.hint:
        print(f"Hint: {problem.hint}", file=stream)
    return problem.exit_code


_ARGUMENTS = {
    "num_speculative_tokens": "-k",
    "local_files_only": "--offline",
    "banned_token_ids": "--ban-token",
    "forced_token_ids": "--force-token",
} | {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "acceptance",
        "backend",
        "context_length",
        "device",
        "drafter",
        "dtype",
        "exactness",
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "max_new_tokens",
        "min_new_tokens",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "revision",
        "seed",
        "stop",
        "temperature",
        "time_limit",
        "top_k",
        "top_p",
        "trust_remote_code",
    )
}
_ARGUMENT = re.compile(rf"(?<![\w-])({'|'.join(_ARGUMENTS)})=('[^']*'|[\w:/-]+(?:\.\w+)*)?")


def in_options(text: str) -> str:
    """Python arguments in a sentence of the library, written as options.

    >>> in_options("Use drafter=None, or device='cpu'; context_length=64 is too long.")
    'Use --drafter none, or --device cpu; --context-length 64 is too long.'
    """

    def option(match: re.Match[str]) -> str:
        name, value = _ARGUMENTS[match[1]], (match[2] or "").strip("'")
        return name if value in {"", "True"} else f"{name} {'none' if value == 'None' else value}"

    return _ARGUMENT.sub(option, text)


def show_warnings() -> None:
    """Let warnings be one line on standard error, without the source line that raised them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"Warning: {_one_line(str(message))}", file=file or sys.stderr)

    warnings.showwarning = show


def _one_line(text: str) -> str:
    return " ".join(text.split())
