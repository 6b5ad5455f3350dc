"""uvicorn's HTTP protocol, with errors in the API's shape and time limits where uvicorn has none."""

from __future__ import annotations

import asyncio
import http
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from polydraft_server.answers import encoded
from polydraft_server.problems import Problem

__all__ = ["Protocol"]

_HEAD_SECONDS = 30.0
"""Time in which the head of a request must have arrived."""
_LINGER_SECONDS = 2.0
"""Time for a client to read why it was refused, while what it still sends is thrown away."""
_FLUSH_SECONDS = 30.0
"""Time for a client to read the end of its last answer."""

_SAID = {
    431: "The headers of the request are too large.",
    501: "The request has a transfer coding other than `chunked`. Send it chunked, or with its `Content-Length`.",
}


class Protocol(H11Protocol):
    """One connection."""

    _head: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        # A client that does not read its stream cannot be waited for: ``scope["state"]["abort"]`` ends its connection.
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the connection has been refused."""
        if not self._refused:
            super().data_received(data)
            self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or has too large a head, and let the client read why."""
        error: Any = sys.exception()  # h11's, which uvicorn handles by this call
        status = getattr(error, "error_status_hint", 400)
        said = _SAID.get(status, "The request is not valid HTTP.")
        if self._refused or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self._refused = True
        self._forget_head()
        body = encoded(Problem(status, said, code="request_too_large" if status == 431 else None).body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase.encode())
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        # Closed at once, the connection would be reset by what the client still sends, and the answer lost.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _should_upgrade(self) -> bool:
        """There is nothing to upgrade to; uvicorn would advise whoever reads the log to install WebSockets."""
        return False

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what its client does not read is dropped after a while."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(_FLUSH_SECONDS, self.transport.abort)

    def _watch_head(self) -> None:
        """Have a time limit while, and only while, a request's head is awaited."""
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head is None and not self._refused:
            self._head = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None
