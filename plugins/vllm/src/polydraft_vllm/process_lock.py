"""One lock for all vLLM engines of this process.

vLLM keeps the forward context and the current configuration in module variables: two engines must not run at the same
time.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

__all__ = ["VLLM_LOCK", "FairLock"]


class FairLock:
    """A lock that goes to the thread that has waited longest, so that an engine that steps does not starve others."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()  # still held: handed over
            else:
                self._held = False


VLLM_LOCK = FairLock()
"""Held while an engine starts, steps or is freed."""
