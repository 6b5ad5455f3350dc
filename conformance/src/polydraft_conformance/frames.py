"""Where in a backend an exception comes from: its own frames, without those of pytest, the suite and the core."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ["backend_frames", "is_suites_own"]

_SUITE = "polydraft_conformance"
_FOLDER = Path(__file__).parent
_DEFECTS = _FOLDER / "defects"
"""Backends that come with the suite."""
_AROUND = frozenset({_SUITE, "polydraft", "_pytest", "pytest", "pluggy", "xdist", "contextlib", "threading"})
"""Packages that a call passes through on its way to a backend."""
_MOST = 8
"""Frames that are shown, the innermost ones."""


def is_suites_own(error: BaseException) -> bool:
    """Whether a check raised it (or pytest, for a check), not the code that it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not frames or _package(frames[-1]) in {_SUITE, "_pytest", "pytest"}


def backend_frames(error: BaseException) -> list[str]:
    """``at my_plugin.engine:42 in verify: ...`` for each frame of the backend, the innermost last.

    The core raises its own errors from those of an engine: then the engine's are shown. Empty where no frame is the
    backend's.
    """
    for raised in reversed(list(_chain(error))):
        found = [
            (frame, line) for frame, line in traceback.walk_tb(raised.__traceback__) if _package(frame) not in _AROUND
        ]
        if found:
            left_out = len(found) - _MOST
            head = [f"  ... {left_out} outer frames"] if left_out > 0 else []
            return [*head, *(_described(frame, line) for frame, line in found[-_MOST:])]
    return []


def _described(frame: FrameType, line: int) -> str:
    summary = traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name)
    # Modules, not paths: reports travel, and paths name home folders.
    return f"  at {_module(frame)}:{line} in {summary.name}{f': {summary.line}' if summary.line else ''}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _package(frame: FrameType) -> str:
    """``polydraft`` for code of ``polydraft.loading``; checks may be imported under any name."""
    file = Path(frame.f_code.co_filename)
    if file.is_relative_to(_DEFECTS):
        return "defects"
    return _SUITE if file.is_relative_to(_FOLDER) else _module(frame).partition(".")[0]
