"""What an engine raises, as errors of polydraft."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from polydraft._containment import is_callers_own
from polydraft._loop.returned import ContractError
from polydraft.errors import EngineError, OutOfMemoryError, PolydraftError

if TYPE_CHECKING:
    from polydraft.contract.results import RunningInfo

__all__ = ["as_engine_errors", "engine_failure"]


def engine_failure(error: BaseException, running: RunningInfo, doing: str = "") -> BaseException:
    """What to raise in place of ``error``: one of polydraft's errors; itself if it is one, or the caller's own.

    ``SystemExit`` and the like become errors as well: an engine must not end the app.

    Args:
        error: What the engine raised.
        running: Names the engine and the backend.
        doing: When, as part of a sentence: "in its close()".
    """
    if isinstance(error, ContractError):
        return EngineError(
            error.message, f"This is a defect of the backend {running.backend}; report it to its authors."
        )
    if isinstance(error, PolydraftError) or is_callers_own(error):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemoryError(
            "Memory ran out while generating.", "Give a smaller `context_length`, or a smaller model."
        )
    return EngineError(
        f"The engine {running.engine} failed{doing and f' {doing}'}: {type(error).__name__}: {error}",
        f"If it happens again, report it to the authors of the backend {running.backend}.",
    )


class as_engine_errors:  # noqa: N801 - used like a function
    """A block in which what the engine raises becomes one of polydraft's errors: see ``engine_failure``."""

    def __init__(self, running: RunningInfo, doing: str) -> None:
        self._running = running
        self._doing = doing

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            raised = engine_failure(error, self._running, self._doing)
            if raised is not error:
                raise raised from error
