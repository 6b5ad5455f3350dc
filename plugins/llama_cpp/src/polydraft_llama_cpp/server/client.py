"""The HTTP client of a llama-server: JSON requests, and completions as streams of events."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    PolydraftError,
)

from polydraft_llama_cpp.server.options import KEY_VARIABLE

__all__ = ["Client", "Completion"]


class Client:
    """A client of one server, with a connection per request.

    Args:
        url: ``http://127.0.0.1:8080``; https as well.
        api_key: Sent as a bearer token; None: no token is sent.
        timeout: Seconds to wait for the next bytes.

    Raises:
        InvalidRequestError: The url is not an HTTP URL, or contains a password.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self._parts = _parts(self.url)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout

    def get(self, path: str) -> Any:
        """The JSON of a GET.

        Raises:
            EngineError: The server cannot be reached, or answers with an error.
            BackendUnavailableError: It does not accept the key.
            ContextLengthError: The prompt is longer than its context.
        """
        return self._json("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of a POST. Errors as for ``get``."""
        return self._json("POST", path, body)

    def complete(self, body: dict[str, Any]) -> Completion:
        """Start a streamed completion. Errors as for ``get``."""
        connection, response = self._open("POST", "/completion", {**body, "stream": True})
        return Completion(connection, response)

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        connection, response = self._open(method, path, body)
        try:
            return json.loads(response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _lost(error) from error
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._parts.path + path, data, self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise _refused(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _lost(error) from error
        except BaseException:
            connection.close()
            raise
        return connection, response


class Completion:
    """A completion in progress: iterate over its events, one per token. ``close`` makes the server stop."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for line in self._response:
                if line.startswith(b"error:"):
                    raise _refused(500, line[6:])
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    event: dict[str, Any] = json.loads(line[6:])
                    if "error" in event:
                        raise _refused(500, line[6:])
                    yield event
                    if event.get("stop"):
                        return
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _lost(error) from error
        raise EngineError("llama-server ended an answer before it was complete.", "Look at the server's log.")

    def close(self) -> None:
        """Close the connection. May be called twice."""
        with suppress(OSError):
            self._response.close()
            self._connection.close()


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if "@" in url or (usable and (parts.query or parts.fragment)):
        raise InvalidRequestError(
            "The url contains more than the server's address (a user name, a password or a query).",
            f"Set the API key in the environment variable {KEY_VARIABLE}.",
        )
    if not usable:
        raise InvalidRequestError(f"url={url!r} is not the URL of a server.", "Give it as http://host:8080.")
    return parts


def _lost(error: Exception) -> EngineError:
    return EngineError(
        f"The connection to llama-server was lost: {error!r}.", "Look at the server's log; load the session again."
    )


def _refused(status: int, body: bytes) -> PolydraftError:
    if status in {401, 403}:
        return BackendUnavailableError(
            "llama-server does not accept the API key.",
            f"Set the environment variable {KEY_VARIABLE} to the right one.",
        )
    try:
        found = json.loads(body)
        error = found.get("error", found)
        message, kind = str(error.get("message", "")), str(error.get("type", ""))
    except (ValueError, AttributeError):
        message, kind = body[:200].decode("utf-8", "replace"), ""
    if kind == "exceed_context_size_error":
        return ContextLengthError(f"llama-server: {message}", "Load it with a larger context_length.")
    return EngineError(f"llama-server answered {status}: {message}", "Look at the server's log.")
