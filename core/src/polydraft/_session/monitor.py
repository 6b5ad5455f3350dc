"""Warn once when a session's drafter proposes nothing, or is almost never accepted."""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polydraft._session.call import Call
    from polydraft.contract.results import RunningInfo

__all__ = ["AcceptanceMonitor", "SpeculationWarning"]

_SILENT_STEPS = 32  # target steps without any draft
_MIN_DRAFTED = 200  # drafted tokens before the acceptance rate is meaningful
_NEAR_ZERO = 0.02  # an assistant of another target is accepted 2 times in 304 (vLLM, measured)


class SpeculationWarning(UserWarning):
    """Speculation runs, but gains no speed."""


class AcceptanceMonitor:
    """Sums over a session's generations. N-gram drafting is exempt: it often has nothing to propose."""

    def __init__(self, running: RunningInfo) -> None:
        self._running = running
        self._active = running.method not in (None, "ngram")
        self._lock = threading.RLock()  # reentrant: garbage collection may end a dropped stream at any moment
        self._steps = self._drafted = self._accepted = 0

    def add(self, call: Call) -> None:
        """Count a finished generation, and warn if the counts now show a useless drafter."""
        stats = call.stats()
        if call.speculation_off is not None or stats.num_draft_tokens is None:
            return
        with self._lock:
            self._steps += stats.num_target_steps or 0
            self._drafted += stats.num_draft_tokens
            self._accepted += stats.num_accepted_tokens or 0
            message = self._message() if self._active else None
            self._active = self._active and message is None
        # Outside the lock: a warning filter may raise, or run the caller's code.
        if message is not None:
            warnings.warn(message, SpeculationWarning, stacklevel=2)

    def _message(self) -> str | None:
        pair = f"the drafter {self._running.drafter} of {self._running.target}"
        if self._drafted == 0:
            if self._steps < _SILENT_STEPS:
                return None
            return f"{pair[0].upper()}{pair[1:]} has drafted nothing in {self._steps} steps: speculation gains nothing."
        if self._drafted >= _MIN_DRAFTED and self._accepted < _NEAR_ZERO * self._drafted:
            return (
                f"Only {self._accepted} of {self._drafted} tokens of {pair} were accepted: it may belong to another "
                "target, or the target's weights or KV cache are quantized too coarsely for it."
            )
        return None
