"""The session that a server serves, loaded again if its engine's process is lost."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from polydraft import RunningInfo, Session
from polydraft.errors import EngineCrashedError

from polydraft_server.problems import ApiError, without_paths

__all__ = ["Served", "public_name"]

log = logging.getLogger("polydraft.server")

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds before the engine is loaded once more, after failures."""


def public_name(model: str) -> str:
    """What clients call a model: its id, or of a path the last part, since paths are this machine's.

    >>> public_name("org/name"), public_name("builtin:toy"), public_name("/srv/models/gemma-4")
    ('org/name', 'builtin:toy', 'gemma-4')
    """
    if re.match(r"[/\\~.]|[A-Za-z]:[/\\]", model) or model.count("/") > 1:
        return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or "model"
    return model


class Served:
    """One model behind the server.

    Args:
        session: Loaded; ``close`` closes it.
        load: Loads the same again; None: a lost engine stays lost.
    """

    def __init__(self, session: Session, load: Callable[[], Session] | None = None) -> None:
        self._session: Session | None = session
        self._load = load
        self._loading: asyncio.Task[None] | None = None
        self.running: RunningInfo = session.running
        """What runs, or ran last."""

    @property
    def ready(self) -> bool:
        """Whether there is an engine."""
        return self._session is not None

    def session(self) -> Session:
        """The session.

        Raises:
            ApiError: Its engine is lost, and not loaded again yet.
        """
        if self._session is None:
            raise ApiError.of(
                503,
                "The engine has ended unexpectedly, and is being loaded again.",
                "Try again.",
                kind="server_error",
                code="engine_loading",
                retry_after=5,
            )
        return self._session

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """A block that uses a session: if its engine ends, it is loaded again."""
        try:
            yield
        except EngineCrashedError:
            if self._session is session:  # else somebody else has found it
                self._session = None
                self._loading = asyncio.create_task(self._again(session))
            raise

    async def _again(self, lost: Session) -> None:
        with suppress(Exception):
            await asyncio.to_thread(lost.close)
        pause = _FIRST_PAUSE
        while self._load is not None:
            try:
                session = await asyncio.to_thread(self._load)
            except Exception as error:
                log.error("The engine cannot be loaded again: %s The next try is in %g seconds.", error, pause)
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause)
                continue
            self._session, self.running = session, session.running
            log.warning("The engine has been loaded again.")
            return

    async def close(self) -> None:
        """Stop loading, and close the session."""
        if self._loading is not None:
            self._loading.cancel()
            with suppress(asyncio.CancelledError):
                await self._loading
        session, self._session = self._session, None
        if session is not None:
            await asyncio.to_thread(session.close)

    def close_now(self) -> None:
        """Close the session outside the event loop, if ``close`` has not."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def described(self) -> dict[str, Any]:
        """What runs, as clients may know it: without paths."""
        running = self.running
        off = running.speculation_off
        return {
            "backend": running.backend,
            "engine": running.engine,
            "engine_version": running.engine_version,
            "drafter": None if running.drafter is None else public_name(running.drafter),
            "method": running.method,
            "num_speculative_tokens": running.num_speculative_tokens,
            "max_speculative_tokens": running.max_speculative_tokens,
            "dtype": running.dtype,
            "matmul_precision": running.matmul_precision,
            "device": running.device,
            "exactness": running.exactness,
            "concurrency": running.concurrency,
            "speculation_off": None if off is None else without_paths(off.message),
        }
