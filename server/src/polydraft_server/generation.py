"""The generations of one request: each waits for its turn, runs at its own speed, and ends when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polydraft import Chunk, GenerationResult, Prompt, Session, TokenStream

from polydraft_server.admission import Admitted
from polydraft_server.metrics import Metrics
from polydraft_server.problems import ApiError
from polydraft_server.served import Served

__all__ = ["Event", "Job", "Run", "finish_reason"]


@dataclass(frozen=True, slots=True)
class Job:
    """One generation of a request."""

    index: int
    """Of its choice in the answer."""
    prompt: Prompt
    arguments: dict[str, Any]
    """Of ``Session.generate``."""
    one_call: bool = False
    """Whether it ends with its first tool call."""


Event = tuple[int, Chunk | GenerationResult]
"""Index of the choice, and what came: chunks, then the result."""


def finish_reason(result: GenerationResult, *, one_call: bool = False) -> str:
    """OpenAI's reason. A generation that was cut after its first tool call ended with it."""
    if result.tool_calls and (one_call or result.finish_reason in ("eos", "stop")):
        return "tool_calls"
    return "length" if result.finish_reason in ("length", "context") else "stop"


class Run:
    """Runs the jobs of one request. ``next`` gives what comes, until all have ended; ``close`` ends them.

    What is generated waits in memory for a slow reader, at most the request's own ``max_tokens``: no reader holds the
    engine back.

    Args:
        served: Has the session.
        admitted: The request's places.
        jobs: At least one.
        seconds: Time limit of each job, its wait included.
        metrics: Gets the times.
    """

    def __init__(
        self, served: Served, admitted: Admitted, jobs: Sequence[Job], seconds: float, metrics: Metrics
    ) -> None:
        self._served = served
        self._admitted = admitted
        self._jobs = jobs
        self._seconds = seconds
        self._metrics = metrics
        self._began = time.monotonic()
        self._events: asyncio.Queue[tuple[int, Chunk | GenerationResult | Exception]] = asyncio.Queue()
        self._opened: dict[int, tuple[Session, TokenStream]] = {}
        self._begun: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._left = len(jobs)
        self._closing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Check the jobs and start them.

        Raises:
            PolydraftError: One asks for what the model or the backend cannot do.
            ApiError: There is no engine now.
        """
        session = self._served.session()
        for job in self._jobs:
            self._opened[job.index] = session, await self._stream(session, job)
        self._tasks = [asyncio.create_task(self._produce(job)) for job in self._jobs]

    async def next(self) -> Event | None:
        """The next chunk or result; None once all jobs have ended.

        Raises:
            PolydraftError: A generation failed.
            ApiError: It took too long, or the server stops.
        """
        if not self._left:
            return None
        if not self._events.empty():
            # What has gathered would be sent without a break, and the client's leaving, say, not be noticed meanwhile.
            await asyncio.sleep(0)
        index, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        self._left -= isinstance(event, GenerationResult)
        return index, event

    def tell(self, error: Exception) -> None:
        """End it with an error, which ``next`` raises."""
        self._events.put_nowait((0, error))
        for task in self._tasks:
            task.cancel()

    @property
    def ended(self) -> bool:
        """Whether all results have been read."""
        return not self._left

    async def close(self) -> None:
        """End what still runs, and wait until the engine has stopped, however often the waiting task is cancelled."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, stream in self._opened.values():
            stream.close()  # it has not begun: there is nothing to wait for
        self._admitted.close()

    async def _stream(self, session: Session, job: Job) -> TokenStream:
        with self._served.watching(session):
            # In a thread: a long prompt takes its time to be encoded, and others' answers go on meanwhile.
            return await asyncio.to_thread(session.stream, job.prompt, **job.arguments)

    async def _produce(self, job: Job) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                result = await self._generate(job)
        except TimeoutError:
            self._events.put_nowait((job.index, _too_slow(self._seconds)))
        except Exception as error:
            self._events.put_nowait((job.index, error))
        else:
            now = time.monotonic() - self._began
            self._metrics.ended(result, now, finish_reason(result, one_call=job.one_call))
            self._events.put_nowait((job.index, result))

    async def _generate(self, job: Job) -> GenerationResult:
        async with self._admitted.turn():
            self._metrics.started(time.monotonic() - self._began)
            session, stream = self._opened.pop(job.index)
            if session is not (current := self._served.session()):  # loaded again while it waited
                session, stream = current, await self._stream(current, job)
            with self._served.watching(session):
                return await self._read(job, stream)

    async def _read(self, job: Job, stream: TokenStream) -> GenerationResult:
        """Read a stream to its end in a thread of its own: the engine waits neither for this one nor for a client."""
        loop = asyncio.get_running_loop()

        def work() -> GenerationResult:
            with stream:
                for chunk in stream:
                    loop.call_soon_threadsafe(self._came, job.index, chunk)
                    if job.one_call and chunk.tool_calls:
                        break
            assert stream.result is not None
            return stream.result

        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            stream.cancel()
            while not working.done():  # the turn ends when the engine has stopped, and not before
                with contextlib.suppress(BaseException):
                    await asyncio.shield(working)
            raise

    def _came(self, index: int, chunk: Chunk) -> None:
        if index not in self._begun:
            self._begun.add(index)
            self._metrics.first_token(time.monotonic() - self._began)
        self._events.put_nowait((index, chunk))


def _too_slow(seconds: float) -> ApiError:
    return ApiError.of(
        408,
        f"The answer was not ready within {seconds:g} seconds, the wait for its turn included.",
        "Ask for fewer tokens, or have the server's time limit raised.",
        kind="timeout_error",
        code="timeout",
    )
