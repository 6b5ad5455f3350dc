"""A session belongs to the process that loaded it."""

from __future__ import annotations

import os

from polydraft.errors import ForkedSessionError

__all__ = ["HomeProcess"]


class HomeProcess:
    """Remembers the process that it was made in."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """False in a process forked from it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse use in a forked process.

        Raises:
            ForkedSessionError: This is one.
        """
        if not self.is_here:
            raise ForkedSessionError(
                "This session was loaded in another process, before a fork.",
                "Load the session in the process that uses it, or start processes with the spawn method.",
            )
