"""What an engine raises, as errors of polydraft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def as_engine_errors(running: RunningInfo, doing: str) -> Iterator[None]:
    """Raise what the engine raises in this block as errors of polydraft."""
    try:
        yield
    except BaseException as error:
        raised = engine_failure(error, running, doing)
        if raised is error:
            raise
        raise raised from error
