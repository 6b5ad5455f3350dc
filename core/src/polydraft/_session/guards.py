"""What refuses a call that could not work: in a forked process, or from inside a step of the same session."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from polydraft.errors import ForkedSessionError, SessionBusyError

__all__ = ["ProcessGuard", "Reentrancy"]


class ProcessGuard:
    """Remembers the process that created it: a session belongs to the process that loaded it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """False in a process forked from it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse use in a forked process.

        Raises:
            ForkedSessionError: This is a forked process.
        """
        if not self.is_here:
            raise ForkedSessionError(
                "This session was loaded in another process, before a fork.",
                "Load the session in the process that uses it, or start processes with the spawn method.",
            )


class Reentrancy(threading.local):
    """Whether the current thread is inside a step of the session. One per session, with a value for each thread.

    A logits processor runs inside a step, and a signal handler may: a call that they make must not wait for that step.
    """

    def __init__(self) -> None:
        self._depth = 0

    def __bool__(self) -> bool:
        return self._depth > 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While this thread steps or ends a stream."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def check(self) -> None:
        """Refuse a call from inside a step.

        Raises:
            SessionBusyError: This thread is inside a step of the session.
        """
        if self:
            raise SessionBusyError(
                "This session was called from inside one of its own steps (by a logits processor or signal handler).",
                "Call it when the step is over, or load a second session.",
            )
