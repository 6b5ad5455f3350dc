"""Errors across the pipe: what the worker raises is raised in the app, of the same class and with all attributes."""

from __future__ import annotations

import json
import traceback
from typing import Any

from polydraft import errors
from polydraft._workers.messages import Failure
from polydraft.errors import PolydraftError

__all__ = ["WorkerTracebackError", "error_of", "failure_of"]

_LONGEST = 20_000
"""Characters of a traceback."""


class WorkerTracebackError(Exception):
    """The cause of an error from a worker: where it was raised there, as text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def failure_of(error: PolydraftError) -> Failure:
    """An error, as a message."""
    cause = error.__cause__ or error.__context__
    system = cause if isinstance(cause, OSError) and cause.errno is not None else None
    return Failure(
        classes=tuple(one.__name__ for one in type(error).__mro__ if getattr(errors, one.__name__, None) is one),
        message=error.message,
        hint=error.hint,
        attributes={name: value for name, value in vars(error).items() if _crosses(name, value)},
        os_error=None
        if system is None
        else (system.errno or 0, system.strerror or "", None if system.filename is None else str(system.filename)),
        traceback="".join(traceback.format_exception(error))[-_LONGEST:],
    )


def _crosses(name: str, value: Any) -> bool:
    if name in {"message", "hint"} or name.startswith("__"):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False  # an object of the engine's: its text is in the traceback
    return True


def error_of(failure: Failure) -> PolydraftError:
    """The error of a message, ready to be raised."""
    found = (getattr(errors, name, None) for name in failure.classes)
    kind = next((one for one in found if isinstance(one, type) and issubclass(one, PolydraftError)), PolydraftError)
    # Not by its own ``__init__``: classes have further arguments, which their attributes hold.
    error = kind.__new__(kind)
    PolydraftError.__init__(error, failure.message, failure.hint)
    for name, value in failure.attributes.items():
        setattr(error, name, value)
    cause: Exception = WorkerTracebackError(failure.traceback)
    if failure.os_error is not None:
        system = OSError(*failure.os_error)
        system.__cause__ = cause
        cause = system
    error.__cause__ = cause
    return error
