"""Which generation runs next: so many at a time, the others in a bounded queue in which clients take turns."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from polydraft_server.problems import ApiError

__all__ = ["Admission", "Admitted"]

_FIRST_GUESS = 2.0
"""Seconds that a generation is taken to need before one has ended."""
_LONGEST_WAIT = 60
"""The largest ``Retry-After``, seconds."""


class Admission:
    """The places of a server. For one event loop.

    Args:
        running: Generations at a time.
        waiting: Generations that may wait.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.limit = running
        self.running = 0
        """Generations that have their turn now."""
        self._most = running + waiting
        self._admitted = 0
        # By client, the one whose turn is next first. A client without a waiting generation has no entry.
        self._queues: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()
        self._seconds = _FIRST_GUESS
        self._stopping = False

    @property
    def waiting(self) -> int:
        """Admitted generations that have no turn yet."""
        return sum(map(len, self._queues.values()))

    @property
    def stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopping

    def admit(self, client: Hashable, count: int) -> Admitted:
        """Places for ``count`` generations of a client.

        Raises:
            ApiError: There is no room for them (429, with the time to wait), never will be (400), or the server stops.
        """
        if self._stopping:
            raise stopping()
        if count > self._most:
            raise ApiError.of(
                400,
                f"The request asks for {count} answers, and this server takes at most {self._most} at a time.",
                "Ask for fewer, in several requests.",
                param="n",
            )
        if self._admitted + count > self._most:
            wait = min(_LONGEST_WAIT, 1 + int(self._seconds * self._admitted / self.limit / 2))
            raise ApiError.of(
                429,
                f"The server is at work on {self._admitted} generations, and takes no more.",
                f"Try again in {wait} seconds.",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        self._admitted += count
        return Admitted(self, client, count)

    def stop(self) -> None:
        """Take nothing more, and tell those that wait."""
        self._stopping = True
        for queue in self._queues.values():
            for turn in queue:
                if not turn.done():
                    turn.set_exception(stopping())
        self._queues.clear()

    def _leave(self, count: int) -> None:
        self._admitted -= count

    @asynccontextmanager
    async def _turn(self, client: Hashable) -> AsyncIterator[None]:
        if self._stopping:
            raise stopping()
        if self.running < self.limit and not self._queues:
            self.running += 1
        else:
            await self._wait(client)
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += (time.monotonic() - began - self._seconds) / 8
            self.running -= 1
            self._next()

    async def _wait(self, client: Hashable) -> None:
        """Wait for a turn, which ``_next`` has then counted."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # given in the same moment
                self.running -= 1
                self._next()
            elif (queue := self._queues.get(client)) is not None and turn in queue:
                queue.remove(turn)
                if not queue:
                    del self._queues[client]
            raise

    def _next(self) -> None:
        """Give free turns to those that wait, one client after the other."""
        while self._queues and self.running < self.limit:
            client, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind the others
            if not turn.done():
                self.running += 1
                turn.set_result(None)


class Admitted:
    """The places of one request."""

    def __init__(self, admission: Admission, client: Hashable, count: int) -> None:
        self._admission = admission
        self._client = client
        self._places = count

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn of one generation; its place is free again afterwards.

        Raises:
            ApiError: The server stops.
        """
        async with self._admission._turn(self._client):
            try:
                yield
            finally:
                self._leave(1)

    def close(self) -> None:
        """Give back the places of generations that had no turn."""
        self._leave(self._places)

    def _leave(self, count: int) -> None:
        self._places -= count
        self._admission._leave(count)


def stopping() -> ApiError:
    """What a client is told while the server stops."""
    return ApiError.of(
        503, "The server is stopping.", "Try again later.", kind="server_error", code="server_stopping", retry_after=5
    )
