"""Load an engine: what it raises becomes an error of ``load``, and ``exactness="bitwise"`` is checked."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from polydraft._containment import is_callers_own
from polydraft._loop.fixed_steps import check_fixed_steps
from polydraft.contract.stepping import SteppingEngine
from polydraft.errors import EngineError, OutOfMemoryError, PolydraftError
from polydraft.files import system_error

if TYPE_CHECKING:
    from polydraft.contract.backend import Backend
    from polydraft.contract.requests import LoadRequest
    from polydraft.contract.whole import WholeEngine

__all__ = ["load_engine"]

_log = logging.getLogger("polydraft.load")
_progress = logging.getLogger("polydraft.progress")


def load_engine(backend: Backend, request: LoadRequest) -> tuple[SteppingEngine | WholeEngine, list[str]]:
    """The loaded engine, and notes on it; whatever an engine raises becomes a typed error of ``load``."""
    started = time.monotonic()
    _progress.info("Loading %s into %s", request.target.id, request.backend)
    try:
        engine = backend.load_engine(request)
        seconds = time.monotonic() - started
        _log.info("%s loaded %s in %.1f s", request.backend, request.target.id, seconds)
        if request.exactness != "bitwise" or not isinstance(engine, SteppingEngine):
            return engine, []
        _progress.info("Checking that plain and speculative steps give equal bits")
        try:
            note = check_fixed_steps(engine, request, seconds)
        except BaseException:
            with suppress(Exception):
                engine.close()
            raise
    except PolydraftError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(
            f"Memory ran out while {request.backend} loaded {request.target.id}.",
            "Give a smaller `context_length`, or a smaller model.",
        ) from error
    except BaseException as error:
        if is_callers_own(error):
            raise
        if refused := system_error(error, f"{request.backend} cannot load {request.target.id}"):
            raise refused from error
        message = str(error).strip().partition("\n")[0].rstrip(".")
        raise EngineError(
            f"The backend {request.backend} could not load {request.target.id}: {type(error).__name__}"
            f"{f': {message}' if message else ''}.",
            "`polydraft doctor` shows whether the engine works; if it does, report this with the error's cause.",
        ) from error
    return engine, [note] if note else []
