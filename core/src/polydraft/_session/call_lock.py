"""The lock of a session's calls: one after the other, or all together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from polydraft.errors import SessionBusyError

__all__ = ["CallLock", "busy_error", "current_thread_owner"]

_LOOK_EVERY = 0.02  # seconds between checks whether a waiting call was cancelled


def current_thread_owner() -> Hashable:
    """The owner of a call that this thread makes."""
    return ("thread", threading.get_ident())


def busy_error(owner: str) -> SessionBusyError:
    """The error for an owner (``thread`` or ``task``) that would deadlock, waiting for itself."""
    return SessionBusyError(
        f"This session runs one call at a time, and an unfinished stream of this {owner} holds it.",
        "Finish or close that stream first, or load a second session.",
    )


class CallLock:
    """The one lock of a session whose calls are serial; a concurrent session's lock never blocks."""

    def __init__(self, *, serial: bool) -> None:
        self._serial = serial
        self._lock = threading.Lock()
        # Only its holder writes it, and others ask only whether it names themselves: so it needs no lock.
        self._owner: Hashable | None = None

    def try_acquire(self, owner: Hashable) -> bool:
        """Take the lock if it is free; does not wait."""
        if not self._serial:
            return True
        if self._lock.acquire(blocking=False):
            self._owner = owner
            return True
        return False

    def acquire(self, owner: Hashable, given_up: Callable[[], bool]) -> bool:
        """Take the lock, waiting for other owners' calls.

        Args:
            owner: Who takes it.
            given_up: Returns whether to stop waiting; polled.

        Returns:
            True if the lock was taken, False if ``given_up``.

        Raises:
            SessionBusyError: The same owner holds it, so that waiting would never end.
        """
        if self.try_acquire(owner):
            return True
        if self.held_by(owner):
            raise busy_error("thread")
        # In slices: a thread that waits for a lock cannot be woken by a cancellation.
        while not self._lock.acquire(timeout=_LOOK_EVERY):
            if given_up():
                return False
        self._owner = owner
        return True

    def held_by(self, owner: Hashable) -> bool:
        """Whether this owner holds the lock, and has not called ``leave``."""
        return self._serial and self._owner == owner

    def leave(self) -> None:
        """Mark the lock as about to be released, so that its owner's next call waits instead of failing."""
        self._owner = None

    def release(self) -> None:
        """Release the lock."""
        if self._serial:
            self._owner = None
            self._lock.release()
