"""One session that answers lines, several at a time, as the server would: by the server's app, without a socket."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from polydraft import Session

from polydraft_server.app import Api
from polydraft_server.batch.requests_file import RequestLine
from polydraft_server.problems import Problem
from polydraft_server.settings import ServerSettings

__all__ = ["Answering"]

_TRIES_ALONE = 2
"""For a line that was at work when the engine ended."""
_LOADS = 3
"""Tries to load a lost engine again before the batch is given up."""
_MOST_ANSWERS_OF_A_LINE = 128
_STREAMED = Problem(
    400, "A line of a batch has no stream. Leave `stream` out.", code="unsupported", param="stream"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Answered:
    """What the app said to a line."""

    status: int
    headers: dict[bytes, bytes]
    body: Any

    @property
    def again(self) -> bool:
        """Whether the server says that another try may help."""
        return b"retry-after" in self.headers


class Answering:
    """A session at work on lines. An async context manager, which closes the session.

    If the engine ends, it is loaded again, and the lines that it was at work on are done one by one: a line that ends
    every engine costs its neighbours nothing, and gets an error.

    Args:
        session: The session.
        load: Loads the same again.
        settings: Names, default settings and limits. None of a batch's requests is turned away for want of a place.
    """

    def __init__(self, session: Session, load: Callable[[], Session], settings: ServerSettings) -> None:
        self._load = load
        self._failed: list[Exception] = []
        # One more than run, so that the next prompt is encoded by the time of its turn.
        self._at_once = settings.running_at_once(session) + 1
        places = {"max_waiting": _MOST_ANSWERS_OF_A_LINE * self._at_once}
        self._api = Api(session, settings.model_copy(update=places), self._load_again, local=True)
        self._lifespan = self._api.app.router.lifespan_context(self._api.app)

    async def __aenter__(self) -> Answering:
        await self._lifespan.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._lifespan.__aexit__(kind, error, traceback)

    async def answers(self, lines: Iterator[RequestLine]) -> AsyncGenerator[dict[str, Any], None]:
        """The answers, as objects of the file of answers, in the order in which they are ready.

        Raises:
            PolydraftError: The engine has ended and cannot be loaded again.
        """
        at_work: dict[asyncio.Task[_Answered], RequestLine] = {}
        suspects: deque[RequestLine] = deque()
        try:
            while True:
                while not suspects and len(at_work) < self._at_once and (line := next(lines, None)) is not None:
                    at_work[asyncio.create_task(self._ask(line))] = line
                if at_work:
                    done, _ = await asyncio.wait(at_work, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        line, answered = at_work.pop(task), task.result()
                        if answered.again:
                            suspects.append(line)
                        else:
                            yield _answer(line, answered)
                elif suspects:
                    line = suspects.popleft()
                    yield _answer(line, await self._alone(line))
                else:
                    return
        finally:
            for task in at_work:
                task.cancel()
            await asyncio.gather(*at_work, return_exceptions=True)

    async def _alone(self, line: RequestLine) -> _Answered:
        for _ in range(_TRIES_ALONE):
            while not self._api.served.ready:
                if len(self._failed) >= _LOADS:
                    raise self._failed[-1]
                await asyncio.sleep(0.05)
            answered = await self._ask(line)
            if not answered.again:
                break
        return answered

    def _load_again(self) -> Session:
        try:
            session = self._load()
        except Exception as error:
            self._failed.append(error)
            raise
        self._failed.clear()
        return session

    async def _ask(self, line: RequestLine) -> _Answered:
        if json.loads(line.body).get("stream"):
            return _Answered(_STREAMED.status, {}, _STREAMED.body())
        body = line.body.encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": line.url,
            "raw_path": line.url.encode(),
            "query_string": b"",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
            ],
            "client": None,
            "server": None,
        }
        to_send = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if not to_send:
                await asyncio.Event().wait()  # this client never leaves
            return to_send.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await self._api.app(scope, receive, send)
        start, *parts = sent
        text = b"".join(part.get("body", b"") for part in parts)
        return _Answered(start["status"], dict(start["headers"]), json.loads(text))


def _answer(line: RequestLine, answered: _Answered) -> dict[str, Any]:
    """OpenAI's object for a line, and ours: the digest of what was asked for, and fields without effect."""
    ours = {"request": line.digest}
    if b"x-polydraft-ignored" in answered.headers:
        ours["ignored"] = answered.headers[b"x-polydraft-ignored"].decode("latin-1")
    request_id = answered.headers.get(b"x-request-id", b"").decode() or f"req_{secrets.token_hex(12)}"
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": {"status_code": answered.status, "request_id": request_id, "body": answered.body},
        "error": None,
        "polydraft": ours,
    }
