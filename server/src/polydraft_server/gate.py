"""What every request passes first: the key, the host's name, the type of its body; and headers of all answers."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from polydraft.secrets import Secret
from starlette.datastructures import Headers, MutableHeaders

from polydraft_server.answers import encoded
from polydraft_server.problems import ApiError, Problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Gate", "send_problem"]

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""What needs no key: it says nothing about the model, and starts nothing."""
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MEDIA = "application/json"
_LINGER_SECONDS = 2.0
"""Time for what a client still sends when it has its answer: closed at once, the connection would be reset by it, and
the answer lost."""


class Gate:
    """ASGI middleware.

    Args:
        app: What comes behind it.
        key: What requests must send as a bearer token; None: nothing.
        local: Whether only this machine reaches the server, and without a key. Then requests must name it by a local
            name: a page of the web cannot reach it under a name of its own (DNS rebinding).
        host: A further name by which it may be called then.
        failed: Called with the problem of each request that is refused here.
    """

    def __init__(
        self, app: ASGIApp, key: Secret | None, local: bool, host: str, failed: Callable[[Problem], None]
    ) -> None:
        self._app = app
        self._key = None if key is None else f"Bearer {key.reveal()}".encode()
        self._hosts = {*_LOCAL_NAMES, host.lower()} if local and key is None else None
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        unread = _closes(scope)

        async def reading() -> Message:
            nonlocal unread
            message = await receive()
            unread &= bool(message.get("more_body"))
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            elif not message.get("more_body"):
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_SECONDS):
                        while unread:
                            await reading()
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            self._failed(error.problem)
            await send_problem(error.problem, with_headers)
            return
        await self._app(scope, reading, with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None:
            name = headers.get("host", "").lower()
            # Browsers always send one.
            if name and not {name, name.rpartition(":")[0]} & self._hosts:
                raise ApiError.of(
                    403,
                    "The request names this server by a host name that is not local.",
                    "Call it as http://127.0.0.1 or http://localhost, or start it with a key.",
                    code="host_not_allowed",
                )
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, self._key):
                raise ApiError.of(
                    401,
                    "The request has no key, or a wrong one.",
                    "Send the server's key in the header `Authorization: Bearer ...`.",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
        # Other types can be sent by any web page without the browser asking first.
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != _MEDIA:
            raise ApiError.of(415, "The body is not sent as JSON.", f"Send the header `Content-Type: {_MEDIA}`.")


def _closes(scope: Scope) -> bool:
    """Whether the connection ends with this answer, and the client sends on: one that waits for a 100 does not."""
    headers = Headers(scope=scope)
    closing = scope["http_version"] == "1.0" or "close" in headers.get("connection", "").lower()
    return closing and "expect" not in headers


async def send_problem(problem: Problem, send: Send) -> None:
    """Answer with an error."""
    body = encoded(problem.body())
    headers = {"content-type": _MEDIA, "content-length": str(len(body)), **problem.headers()}
    if problem.status == 401:
        headers["www-authenticate"] = "Bearer"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
