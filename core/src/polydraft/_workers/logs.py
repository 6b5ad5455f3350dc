"""Log records and warnings across the pipe: the app's loggers and filters decide, as for an engine in its process."""

from __future__ import annotations

import builtins
import logging
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from polydraft._presentable import presentable
from polydraft._workers.messages import LogLine, Warned

__all__ = ["follow_levels", "forward_logs", "forward_warnings", "levels_here", "replay_log", "replay_warning"]

_LONGEST = 20_000
"""Characters of a message or a traceback."""


def levels_here() -> dict[str, int]:
    """The levels that this process's loggers have been given; '' is the root's, and what is disabled counts."""
    root = logging.getLogger()
    levels = {"": max(root.level, root.manager.disable + 1 if root.manager.disable else 0)}
    for name, logger in list(root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            levels[name] = logger.level
    return levels


# In the worker --------------------------------------------------------------------------------------------------------


def follow_levels(levels: Mapping[str, int]) -> None:
    """Give this process's loggers the app's levels: what the app would drop is not even made."""
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def forward_logs(send: Callable[[LogLine], None]) -> None:
    """Send every record that reaches the root logger."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                found = "".join(traceback.format_exception(record.exc_info[1])) if record.exc_info else ""
                send(
                    LogLine(
                        name=record.name,
                        level=record.levelno,
                        message=record.getMessage()[:_LONGEST],
                        created=record.created,
                        path=record.pathname,
                        line=record.lineno,
                        function=record.funcName,
                        traceback=found[-_LONGEST:],
                        quiet=_has_own_handler(record.name),
                    )
                )
            except Exception:  # of the record: its text cannot be made
                self.handleError(record)

    logging.getLogger().addHandler(Forward())


def _has_own_handler(name: str) -> bool:
    """Whether the logger, or one above it that is not the root, has a handler: a ``NullHandler`` in most libraries."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger is not logging.getLogger():
        if logger.handlers:
            return True
        logger = logger.parent if logger.propagate else None
    return False


def forward_warnings(send: Callable[[Warned], None], current_call: Callable[[], int]) -> None:
    """Send each warning, once for each place; ``current_call`` gives the number of the call of this thread."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        names = tuple(one.__name__ for one in category.__mro__ if issubclass(one, Warning))
        send(Warned(call=current_call(), classes=names, message=str(message)[:_LONGEST], path=filename, line=lineno))

    warnings.showwarning = show
    # All kinds: the app's own filters choose.
    warnings.simplefilter("default")


# In the app -----------------------------------------------------------------------------------------------------------


def replay_log(line: LogLine) -> None:
    """Give a worker's record to this process's logger of the same name."""
    logger = logging.getLogger(line.name)
    if not logger.isEnabledFor(line.level) or (line.quiet and not logger.hasHandlers()):
        return
    text = f"{line.message}\n{line.traceback}".rstrip() if line.traceback else line.message
    record = logger.makeRecord(line.name, line.level, line.path, line.line, text, (), None, line.function)
    record.created = line.created
    try:
        logger.handle(record)
    except Exception:  # a handler of the app that raises must not end the thread that reads
        logging.lastResort and logging.lastResort.handle(record)


def replay_warning(warned: Warned) -> None:
    """Warn in this process as the engine did in its own; a filter may make an error of it."""
    known = (getattr(builtins, name, None) or _own(name) for name in warned.classes)
    category = next((one for one in known if isinstance(one, type) and issubclass(one, Warning)), UserWarning)
    warnings.warn_explicit(presentable(warned.message), category, warned.path, warned.line)


def _own(name: str) -> Any:
    from polydraft._session.monitor import SpeculationWarning

    return SpeculationWarning if name == SpeculationWarning.__name__ else None
