"""The lock of a session's calls: one after the other, or all together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import suppress

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
    """The one lock of a session whose calls are serial; a concurrent session's lock never blocks.

    It is held for a call, any object: a call that ends releases it whether or not it knows that it was given it, so
    that an interrupt (Ctrl+C) at any moment leaves it neither held for ever nor released by the wrong call.
    """

    def __init__(self, *, serial: bool) -> None:
        self._serial = serial
        # Reentrant: garbage collection or a signal handler may end another call in the middle of a method. An interrupt
        # in the Python code of a Condition could leave that locked.
        self._mutex = threading.RLock()
        self._call: object = None
        self._owner: Hashable | None = None
        self._released = threading.Lock()  # locked, except for a moment after a release: it wakes one waiting call
        self._released.acquire()

    def try_acquire(self, call: object, owner: Hashable) -> bool:
        """Take the lock for a call if it is free, or held for that call already; does not wait."""
        if not self._serial:
            return True
        with self._mutex:
            if self._call is None:
                self._owner, self._call = owner, call
            return self._call is call

    def acquire(self, call: object, owner: Hashable, given_up: Callable[[], bool]) -> bool:
        """Take the lock for a call, waiting for other owners' calls.

        Args:
            call: What it is held for, and released by.
            owner: Who makes the call.
            given_up: Returns whether to stop waiting; polled.

        Returns:
            True if the lock is held for the call, False if ``given_up``.

        Raises:
            SessionBusyError: The same owner holds it for another call, so that waiting would never end.
        """
        while not self.try_acquire(call, owner):
            if self.held_by(owner):
                raise busy_error("thread")
            if given_up():
                return False
            # In slices: a thread that waits cannot be woken by a cancellation.
            self._released.acquire(timeout=_LOOK_EVERY)
        return True

    def held_by(self, owner: Hashable) -> bool:
        """Whether a call of this owner holds the lock."""
        return self._serial and self._owner == owner

    def release(self, call: object) -> None:
        """Release the lock if it is held for this call."""
        with self._mutex:
            if self._call is call:
                self._owner = self._call = None
        if self._released.locked():
            with suppress(RuntimeError):  # another thread was faster
                self._released.release()
