"""A time limit for each check, so that a hang costs its own rows only.

The soft limit interrupts Python code of the main thread through a signal: the row fails, says where each thread was,
and the run continues. Where that does not help (the engine hangs in native code) the hard limit ends the process; under
pytest-xdist (``-n 1``) that costs this row only, because a new worker continues with the next check.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

from polydraft_conformance.signals import TimeLimitError

__all__ = ["time_limit"]

_GRACE = 60.0
"""Seconds from the soft to the hard limit."""
_SHOWN = 3
"""Innermost calls of each thread that are shown."""


def _where(frame: FrameType | None) -> str:
    """Where each thread is, a line each; the main thread, which was interrupted at ``frame``, first."""
    frames = sys._current_frames()
    main = threading.main_thread()
    others = [thread for thread in threading.enumerate() if thread is not main]
    lines = []
    for thread, at in ((main, frame), *((thread, frames.get(thread.ident or 0)) for thread in others)):
        calls = [f"{Path(call.filename).name}:{call.lineno} {call.name}" for call in traceback.extract_stack(at)]
        lines.append(f"thread {thread.name}: {' > '.join(calls[-_SHOWN:])}")
    return "".join(f"\n{line}" for line in lines)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in the main thread after ``seconds``, and end the process a minute later.

    Outside the main thread, and where the platform has no interval timer, only the hard limit works.
    """
    soft = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def expire(_signal: int, frame: FrameType | None) -> None:
        raise TimeLimitError(f"It took longer than the time limit of {seconds:g} s.{_where(frame)}")

    # The process's own stderr: pytest captures sys.stderr, and its file may have no descriptor.
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=sys.__stderr__ or sys.stderr)
    previous = signal.signal(signal.SIGALRM, expire) if soft else None
    if soft:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if soft:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()
