"""Refuse calls that cannot work: in a forked process, or from inside a step of the same session."""

from __future__ import annotations

import os
import threading

from polydraft.errors import ForkedSessionError, SessionBusyError

__all__ = ["StepGuard"]


class StepGuard(threading.local):
    """One per session: knows its process, and whether the current thread is inside one of its steps.

    A logits processor runs inside a step, and a signal handler may: a call from there would wait for itself.

    Args:
        home: Id of the process that loaded the session; ``threading.local`` passes it to each thread's copy.
    """

    def __init__(self, home: int) -> None:
        self._home = home
        self.depth = 0
        """Nested steps, and ends of streams, that this thread is inside of."""

    @property
    def is_home(self) -> bool:
        """False in a process forked from the session's."""
        return os.getpid() == self._home

    def check_home(self) -> None:
        """Refuse use in a forked process, with a ``ForkedSessionError``."""
        if not self.is_home:
            raise ForkedSessionError(
                "This session was loaded in another process, before a fork.",
                "Load the session in the process that uses it, or start processes with the spawn method.",
            )

    def check(self) -> None:
        """Refuse use in a forked process, and from inside a step with a ``SessionBusyError``."""
        if not self.is_home or self.depth:
            self.check_home()
            raise SessionBusyError(
                "This session was called from inside one of its own steps (by a logits processor or signal handler).",
                "Call it when the step is over, or load a second session.",
            )
