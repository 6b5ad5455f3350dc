"""Loaded models, kept until the process ends: LangChain copies a chat model whenever one of its fields is set."""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polydraft import Session

__all__ = ["close_sessions", "session_of"]

_sessions: dict[str, Session] = {}
_lock = threading.Lock()


def session_of(target: str, arguments: dict[str, Any]) -> Session:
    """The session of a target that was loaded with these arguments; it is loaded if there is none yet.

    Args:
        target: What ``polydraft.load`` takes.
        arguments: Its keyword arguments; one load serves all calls that give the same.

    Raises:
        PolydraftError: As ``polydraft.load``.
    """
    import polydraft

    key = repr((target, sorted(arguments.items())))
    if (found := _sessions.get(key)) is not None:  # without the lock: another model may be loading
        return found
    with _lock:
        if key not in _sessions:
            _sessions[key] = polydraft.load(target, **arguments)
        return _sessions[key]


@atexit.register
def close_sessions() -> None:
    """Free all loaded models; the next prompt loads its model again."""
    with _lock:
        while _sessions:
            _sessions.popitem()[1].close()
