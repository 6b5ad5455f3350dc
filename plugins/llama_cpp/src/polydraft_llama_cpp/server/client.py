"""The HTTP client of a llama-server: JSON requests, and completions as streams of events."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    PolydraftError,
)
from polydraft.files import parse_json

from polydraft_llama_cpp.server.options import KEY_VARIABLE

__all__ = ["Client"]


class Client:
    """A client of one server, with a connection per request. ``timeout``: seconds to wait for the next bytes.

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

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of a POST, or without a body of a GET.

        Raises:
            EngineError: The server cannot be reached, or answers with an error.
            BackendUnavailableError: It does not accept the key.
            ContextLengthError: The prompt is longer than its context.
        """
        with self._open(path, body) as response:
            return parse_json(response.read())

    def complete(self, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The events of a streamed completion, one per token; ``close`` ends it. Errors as for ``request``."""
        with self._open("/completion", {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"error:"):
                    raise _refused(500, line[6:])
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    event: dict[str, Any] = parse_json(line[6:])
                    if "error" in event:
                        raise _refused(500, line[6:])
                    yield event
                    if event.get("stop"):
                        return
        raise EngineError("llama-server ended an answer before it was complete.", "Look at the server's log.")

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request while it is read; then the connection is closed."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        try:
            with closing(kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)) as connection:
                connection.request(method, self._parts.path + path, data, self._headers)
                with connection.getresponse() as response:
                    if response.status != http.client.OK:
                        raise _refused(response.status, response.read())
                    yield response
        except PolydraftError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _lost(error) from error


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
        raise InvalidRequestError(f"`url={url!r}` is not the URL of a server.", "Give it as http://host:8080.")
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
        found = parse_json(body)
        error = found.get("error", found)
        message, kind = str(error.get("message", "")), str(error.get("type", ""))
    except (ValueError, AttributeError):
        message, kind = body[:200].decode("utf-8", "replace"), ""
    if kind == "exceed_context_size_error":
        return ContextLengthError(f"llama-server: {message}", "Load it with a larger `context_length`.")
    return EngineError(f"llama-server answered {status}: {message}", "Look at the server's log.")
