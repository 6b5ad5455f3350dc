"""Whether a thread is inside a session's own work, where a call of that session would wait for itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from polydraft.errors import SessionBusyError

__all__ = ["Inside"]


class Inside(threading.local):
    """One a session, with a value for each thread.

    A logits processor runs inside a step, and a signal handler may: what it asks of the session must not wait for
    that step.
    """

    def __init__(self) -> None:
        self._depth = 0

    def __bool__(self) -> bool:
        return self._depth > 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread steps or ends a stream."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def check(self) -> None:
        """Refuse a call from inside.

        Raises:
            SessionBusyError: This thread is in a step of the session.
        """
        if self:
            raise SessionBusyError(
                "This session was called from inside one of its own steps (by a logits processor or signal handler).",
                "Call it when the step is over, or load a second session.",
            )
