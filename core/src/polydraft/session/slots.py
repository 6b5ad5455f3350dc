"""Who may use a session now: one call after the other, or all together."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from polydraft.errors import SessionBusyError

__all__ = ["CallSlot", "current_thread_owner"]


def current_thread_owner() -> Hashable:
    """The owner of a call that this thread makes."""
    return ("thread", threading.get_ident())


class CallSlot:
    """The one slot of a session whose calls are serial; a concurrent session's slot never blocks."""

    def __init__(self, *, serial: bool) -> None:
        self._serial = serial
        self._lock = threading.Lock()
        self._owner: Hashable | None = None

    def try_acquire(self, owner: Hashable) -> bool:
        """Take the slot if it is free; does not wait."""
        if not self._serial:
            return True
        if self._lock.acquire(blocking=False):
            self._owner = owner
            return True
        return False

    def acquire(self, owner: Hashable) -> None:
        """Take the slot, waiting for other owners' calls.

        Raises:
            SessionBusyError: The same owner holds it, so that waiting would never end.
        """
        if self.try_acquire(owner):
            return
        if self._owner == owner:
            raise SessionBusyError(
                "This session runs one call at a time, and an unfinished stream of this thread holds it.",
                "Finish or close that stream first, or load a second session.",
            )
        self._lock.acquire()
        self._owner = owner

    def release(self) -> None:
        """Give the slot back."""
        if self._serial:
            self._owner = None
            self._lock.release()
