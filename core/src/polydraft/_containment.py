"""Contain what code of others does: exceptions that end the app are told apart, and a time limit is put on a call."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["TookTooLong", "is_callers_own", "within"]

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
