"""Contain what code of others does: its exceptions become typed errors, and a time limit is put on a call."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from polydraft.errors import PluginError, PolydraftError

__all__ = [
    "TookTooLong",
    "described",
    "first_line",
    "is_callers_own",
    "plugin_errors",
    "within",
]

R = TypeVar("R")


class TookTooLong(Exception):  # noqa: N818 - caught by whoever calls ``within``
    """The call did not end in time."""


def is_callers_own(error: BaseException) -> bool:
    """Whether an exception is the app's own, which must reach it unchanged: Ctrl+C, or one of its signal handlers'.

    A handler runs in the middle of whatever its thread does, so that its exception seems to come from an engine.
    """
    if isinstance(error, KeyboardInterrupt):
        return True
    # Python runs signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        return False
    codes = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code in codes:
            return True
        step = step.tb_next
    return False


def _code(handler: Any) -> Any:
    """The code object of a function, a partial, a method or a callable object; None of anything else."""
    function = getattr(handler, "func", handler)
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)


def within(seconds: float, work: Callable[[], R]) -> R:
    """The result of ``work``, which runs in a thread of its own; what it raises is raised here.

    Raises:
        TookTooLong: It has not ended in time. Its thread goes on, and does not keep the interpreter from exiting.
    """
    outcome: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, name="polydraft-within", daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TookTooLong from None
    if error is not None:
        raise error
    return cast("R", result)  # None only if ``work`` returns None


@contextmanager
def plugin_errors(backend: str) -> Iterator[None]:
    """Raise what a backend's own code raises in this block as a ``PluginError``; polydraft's errors pass."""
    try:
        yield
    except PolydraftError:
        raise
    except BaseException as error:
        if is_callers_own(error):
            raise
        raise PluginError(f"The backend {backend!r} fails: {described(error)}.", "Report it to its author.") from error


def described(error: BaseException) -> str:
    """The class and the first line of an exception, without a full stop."""
    try:
        return f"{type(error).__name__}: {first_line(error)}"
    except Exception:  # its own __str__ fails
        return type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, without a full stop."""
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
