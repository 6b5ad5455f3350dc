"""A client of an engine's server that trusts no answer: every one has a deadline and a largest size.

A server that is slow, broken or hostile costs a typed error within a known time and a known amount of memory, and the
session goes on. What is limited, and by which option, is in ``HttpLimits``.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self
from urllib.parse import SplitResult, unquote, urlsplit

from polydraft.errors import BackendUnavailableError, EngineError, PolydraftError
from polydraft.files import exhausted
from polydraft.secrets import Secret

__all__ = ["EventStream", "HttpClient", "HttpLimits", "MalformedAnswerError", "NotConnectedError", "Patience"]

_WAIT = 0.1
"""Seconds after which a cancellation is noticed while the server is silent."""
_PIECE = 65536
"""Bytes read at a time."""
_REFUSAL_BYTES, _REFUSAL_SECONDS = 65536, 10.0
"""How much is read of an answer that refuses a request."""
_SHOWN = 300
"""Characters of a server's words that an error shows."""
_BYTES_PER_TOKEN = 32768
"""Of a stream, per token: 64 candidates with their names and log-probabilities are 6 KB."""
_BYTES_PER_PROMPT_TOKEN = 256
"""llama-server repeats the prompt at the end of a stream."""


class NotConnectedError(BackendUnavailableError, EngineError):
    """No connection was made, and nothing was sent."""


class MalformedAnswerError(EngineError):
    """The server's answer is not what its protocol says: no JSON, another type, a field of another shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """How long a server may take, and how much it may send. Times in seconds."""

    connect_timeout: float = 10.0
    """To connect, TLS included."""
    answer_timeout: float = 60.0
    """For a whole answer that is not a stream of tokens, and for what follows a stream's last token."""
    read_timeout: float = 600.0
    """Of a stream, until the next event. Comments, which servers send to keep connections open, are no events."""
    token_timeout: float = 10.0
    """A stream has to end within ``read_timeout``, and this for each requested token."""
    answer_bytes: int = 16 * 2**20
    """Largest answer that is not a stream, headers included."""
    event_bytes: int = 4 * 2**20
    """Largest event of a stream. The whole stream: this and 32 KiB per requested token, 256 bytes per prompt token."""


@dataclass(slots=True)
class Patience:
    """Seconds that are left to wait for a server. Time that the caller takes between two events does not count."""

    seconds: float


class _TooLargeError(Exception):
    """The server sent more than the limit."""


class _CancelledError(Exception):
    """The caller does not want the answer any more."""


class _RefusedError(Exception):
    """The status is not 200; ``reason`` is the typed error."""

    def __init__(self, reason: PolydraftError) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class _Exchange:
    """One request and its answer: until when it is read, and how much of it."""

    deadline: float
    """A time of ``time.monotonic``."""
    most: int
    """Bytes, headers included."""
    cancelled: Callable[[], bool] | None = None
    received: int = 0

    def response(self, source: socket.socket, *arguments: Any, **named: Any) -> http.client.HTTPResponse:
        """An ``http.client`` response that reads within these limits: status line, headers and body."""
        # A ``_Wire`` has the one method of a socket that a response calls.
        return http.client.HTTPResponse(_Wire(source, self), *arguments, **named)  # type: ignore[arg-type]


class _Wire(io.RawIOBase):
    """The bytes that come from a socket, within the limits of an exchange."""

    def __init__(self, source: socket.socket, exchange: _Exchange) -> None:
        super().__init__()
        self._source = source
        self._exchange = exchange
        # http.client closes the socket after the headers; it stays open as long as there is a file on it.
        self._holds_open = source.makefile("rb", buffering=0)

    def makefile(self, *_: Any) -> io.BufferedReader:
        """What ``http.client`` asks a socket for."""
        return io.BufferedReader(self, _PIECE)

    def readable(self) -> bool:
        """True: it is read only."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there, or wait for it: until the deadline, or until the caller has cancelled."""
        exchange = self._exchange
        while True:
            if exchange.cancelled is not None and exchange.cancelled():
                raise _CancelledError
            left = exchange.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._source.settimeout(min(left, _WAIT))
            with suppress(TimeoutError):
                count = self._source.recv_into(buffer)
                exchange.received += count
                if exchange.received > exchange.most:
                    raise _TooLargeError
                return count

    def close(self) -> None:
        """Close the connection."""
        self._holds_open.close()
        self._source.close()
        super().close()


@dataclass(frozen=True, slots=True)
class _Route:
    """How the server is reached: at its own address, or through a proxy."""

    address: SplitResult
    """Whom to connect to."""
    prefix: str = ""
    """What comes before the path in the request."""
    headers: dict[str, str] = field(default_factory=dict)
    """For the proxy."""
    tunnel: bool = False
    """Whether the proxy has to connect to the server first."""


class HttpClient:
    """A client of one server, with a connection per request; several threads can use it.

    Redirects are not followed: the key stays with the host that it was meant for. Compressed answers are not asked for,
    and are refused.

    Args:
        url: The server's root, ``http://host:8000``, as ``polydraft.engine_parts.server_options`` checks it.
        name: What errors call the server: ``The vLLM server``.
        key: Its API key; None: it needs none.
        key_variable: The environment variable in which the user sets the key, for hints.
        limits: How long it may take, and how much it may send.
        own: The server was started here, and is not reached through a proxy. Others are reached through the proxies
            that the environment names.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        key: Secret | None = None,
        key_variable: str = "",
        limits: HttpLimits | None = None,
        own: bool = False,
    ) -> None:
        self.url = url
        self.name = f"{name} at {url}"
        self.key = key
        self.limits = limits or HttpLimits()
        self._key_variable = key_variable
        self._parts = urlsplit(url)
        self._own = own

    def get(self, path: str, *, optional: bool = False) -> bytes | None:
        """The body of the answer to a GET; None if it is ``optional`` and the server refuses it.

        Raises:
            NotConnectedError: No connection was made.
            EngineError: The connection broke, or the answer took too long or was too large.
            PolydraftError: The server refuses the request: see ``refusal``.
        """
        return self._answer(path, None, self.limits.answer_timeout, "", optional)

    def json(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        seconds: float | None = None,
        optional: bool = False,
    ) -> Any:
        """The JSON that answers a POST of ``body``, or a GET without one. Errors as for ``get``.

        Args:
            path: Path on the server, with its slash.
            body: What to send as JSON.
            seconds: Deadline of the answer; None: ``answer_timeout``.
            optional: Return None if the server refuses it.

        Raises:
            MalformedAnswerError: The answer is not JSON.
        """
        found = self._answer(path, body, seconds or self.limits.answer_timeout, "json", optional)
        return None if found is None else self.parsed(found)

    def stream(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        num_tokens: int,
        num_prompt_tokens: int,
        cancelled: Callable[[], bool] | None = None,
        patience: Patience | None = None,
        lines: bool = False,
    ) -> EventStream:
        """Start a streamed generation; returns once the server has accepted it. Errors as for ``get``.

        Args:
            path: Path on the server, with its slash.
            body: What to send as JSON.
            num_tokens: Tokens that the request asks for at most: deadline and largest size follow from it.
            num_prompt_tokens: Tokens of the prompt, which the server may repeat.
            cancelled: Looked at while the server is silent; once it is true, the stream ends.
            patience: How long to wait in all; None: ``patience(num_tokens)``. Several streams can share one.
            lines: Each event is a line of JSON (NDJSON), not a server-sent event.
        """
        limits, repeated = self.limits, num_prompt_tokens * _BYTES_PER_PROMPT_TOKEN
        patience = patience or self.patience(num_tokens)
        most = limits.event_bytes + num_tokens * _BYTES_PER_TOKEN + repeated
        started = time.monotonic()
        exchange = _Exchange(started + min(patience.seconds, limits.read_timeout), most, cancelled)
        try:
            response = self._open(path, body, exchange, "" if lines else "event-stream")
        except _CancelledError:
            response = None
        except _RefusedError as error:
            raise error.reason from None
        patience.seconds -= time.monotonic() - started
        return EventStream(self, exchange, response, patience, limits.event_bytes + repeated, lines=lines)

    def patience(self, num_tokens: int) -> Patience:
        """How long to wait in all for a generation of so many tokens."""
        return Patience(self.limits.read_timeout + num_tokens * self.limits.token_timeout)

    def refusal(self, status: int, said: str, kind: str) -> PolydraftError:
        """The error for an answer that refuses a request. A plugin overrides it for what its server says.

        Args:
            status: HTTP status; 500 for an error inside a stream that has none.
            said: The server's message, shortened and without the key.
            kind: The server's type of the error; may be empty.
        """
        if status in (401, 403):
            return BackendUnavailableError(
                f"{self.name} does not accept the API key.",
                f"Set the environment variable {self._key_variable} to the right one.",
            )
        if 300 <= status < 400:
            return BackendUnavailableError(
                f"{self.name} redirects to another address (HTTP {status}).", "Give that address as url."
            )
        return EngineError(f"{self.name} failed ({status}): {said}", "Look at the server's log.")

    def malformed(self, why: str) -> MalformedAnswerError:
        """The error for an answer that is not what the protocol says."""
        return MalformedAnswerError(
            f"{self.name} gave an answer that its protocol does not have: {self.shown(why)}.",
            "Check the url, and the server's version.",
        )

    def refused(self, status: int, answer: Any) -> PolydraftError:
        """The error for what a server sent instead of an answer: JSON of any shape, or text."""
        error = answer.get("error", answer) if isinstance(answer, dict) else answer
        fields = error if isinstance(error, dict) else {}
        code = fields.get("code")
        # In a stream the status line has said 200: the error's own code counts.
        status = code if status == http.client.OK and isinstance(code, int) else status
        said = fields.get("message") or fields.get("detail") or error or "no reason given"
        status = http.client.INTERNAL_SERVER_ERROR if status == http.client.OK else status
        return self.refusal(status, self.shown(str(said)), str(fields.get("type") or ""))

    def parsed(self, data: bytes) -> Any:
        """JSON from the server.

        Raises:
            MalformedAnswerError: It is not JSON in UTF-8, has numbers that are none, or is nested too deeply.
        """
        try:
            return json.loads(data.decode(), parse_constant=_not_a_number)
        except UnicodeDecodeError:
            raise self.malformed("it is not UTF-8") from None
        except RecursionError:
            raise self.malformed("its JSON is nested too deeply") from None
        except ValueError as error:
            raise self.malformed(f"it is not JSON ({error})") from None

    def token_ids(self, found: object, vocab_size: int) -> tuple[int, ...]:
        """Token ids from a server's JSON.

        Raises:
            MalformedAnswerError: They are not a list of whole numbers from 0 to ``vocab_size - 1``.
        """
        if not isinstance(found, list):
            raise self.malformed("its token ids are not a list")
        for token_id in found:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise self.malformed(f"{str(token_id)[:40]} is not a token id of this model")
        return tuple(found)

    def shown(self, text: str) -> str:
        """A server's words as errors show them: the first line, shortened, without the key."""
        text = (self.key.hidden_in(text) if self.key else text).strip().partition("\n")[0]
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

    @contextmanager
    def errors(self, exchange: _Exchange, late: str) -> Iterator[None]:
        """Turn what goes wrong while an answer is read into typed errors. ``late`` says what was not in time."""
        try:
            yield
        except (PolydraftError, _CancelledError):
            raise
        except TimeoutError:
            raise EngineError(f"{self.name} {late}.", "Look at its log, or give it more time.") from None
        except _TooLargeError:
            raise EngineError(
                f"{self.name} sent more than {exchange.most} bytes, and no answer is that long.", "Check the url."
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if refused := exhausted(error, f"The connection to {self.name} broke"):
                raise refused from None
            said = f"{type(error).__name__}: {error}"
            raise EngineError(
                f"The connection to {self.name} broke: {self.shown(said)}.",
                "The server may have died: look at its log.",
            ) from (error if self.key is None or self.key.hidden_in(said) == said else None)

    def _answer(
        self, path: str, body: Mapping[str, Any] | None, seconds: float, kind: str, optional: bool
    ) -> bytes | None:
        exchange = _Exchange(time.monotonic() + seconds, self.limits.answer_bytes)
        try:
            response = self._open(path, body, exchange, kind)
        except _RefusedError as error:
            if optional:
                return None
            raise error.reason from None
        with closing(response), self.errors(exchange, f"did not answer within {seconds:.3g} seconds"):
            # In pieces: read() would trust the length that the server claims.
            answer = b"".join(iter(lambda: response.read(_PIECE), b""))
            if response.length:  # what is left of that length
                raise http.client.IncompleteRead(b"", response.length)
            return answer

    def _open(
        self, path: str, body: Mapping[str, Any] | None, exchange: _Exchange, kind: str
    ) -> http.client.HTTPResponse:
        """Send a request; the response, once its headers say that a body of this kind follows."""
        seconds = max(exchange.deadline - time.monotonic(), _WAIT)
        route = self._route
        headers = {"Accept-Encoding": "identity", "Connection": "close", **route.headers}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key.reveal()}"
        method, data = "GET", None
        if body is not None:
            method, data = "POST", json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with self.errors(exchange, f"did not answer within {seconds:.3g} seconds"), ExitStack() as failed:
            connection = self._connected(route, exchange)
            failed.callback(connection.close)
            connection.sock.settimeout(seconds)  # for sending everything
            connection.request(method, f"{route.prefix}{self._parts.path}{path}", data, headers)
            response = connection.getresponse()
            failed.pop_all()  # the connection would close its response as well
        try:
            if response.status != http.client.OK:
                raise _RefusedError(self.refused(response.status, self._beginning(response, exchange)))
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in {"identity", ""}:
                raise self.malformed(f"it is compressed ({encoding})")
            given = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if given and not given.endswith(kind):
                raise self.malformed(f"its type is {given}")
        except BaseException:
            response.close()
            raise
        return response

    def _connected(self, route: _Route, exchange: _Exchange) -> http.client.HTTPConnection:
        address, timeout = route.address, self.limits.connect_timeout
        host, port = address.hostname or "", address.port
        if self._parts.scheme == "https":
            port = port or (http.client.HTTP_PORT if route.tunnel else http.client.HTTPS_PORT)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=timeout, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout)
        if route.tunnel:
            connection.set_tunnel(self._parts.hostname or "", self._parts.port or http.client.HTTPS_PORT, route.headers)
        # A class to the type checker; ``http.client`` only calls it.
        connection.response_class = exchange.response  # type: ignore[assignment]
        try:
            connection.connect()
        except (OSError, ValueError, http.client.HTTPException, _TooLargeError) as error:
            connection.close()
            if refused := exhausted(error, f"No connection to {self.name}"):
                raise refused from error
            hint = "Check that it is running, and the url."
            if isinstance(error, ssl.SSLCertVerificationError):
                hint = "If its certificate is your own, set SSL_CERT_FILE to the file of the authority."
            why = self.shown(str(error) or type(error).__name__)
            raise NotConnectedError(f"No connection to {self.name}: {why}.", hint) from error
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Verifies certificates; SSL_CERT_FILE names further authorities."""
        return ssl.create_default_context()

    @property
    def _route(self) -> _Route:
        parts = self._parts
        proxy = None if self._own else urllib.request.getproxies().get(parts.scheme)
        if not proxy or urllib.request.proxy_bypass(parts.netloc):
            return _Route(parts)
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        headers = {}
        if address.username is not None:
            login = f"{unquote(address.username)}:{unquote(address.password or '')}"
            headers["Proxy-Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
        if parts.scheme == "https":
            return _Route(address, headers=headers, tunnel=True)
        return _Route(address, f"http://{parts.netloc}", headers)

    def _beginning(self, response: http.client.HTTPResponse, exchange: _Exchange) -> Any:
        """What the server says in place of an answer: its JSON, or its text as far as it is read here."""
        exchange.deadline = min(exchange.deadline, time.monotonic() + _REFUSAL_SECONDS)
        said = b""
        # As far as it comes: the status is what counts.
        with suppress(OSError, ValueError, http.client.HTTPException, _TooLargeError, _CancelledError):
            while len(said) < _REFUSAL_BYTES and (piece := response.read1(_REFUSAL_BYTES - len(said))):
                said += piece
        try:
            return self.parsed(said)
        except MalformedAnswerError:
            return said.decode(errors="replace")


class EventStream(Iterator[dict[str, Any]]):
    """The events of a streamed generation, each a JSON object. One thread reads it, and closes it.

    It ends when the server ends it, or after a cancellation.

    Raises:
        EngineError: The connection broke, or a limit was reached; the error names it.
        MalformedAnswerError: An event is not a JSON object.
        PolydraftError: The server reports an error: see ``HttpClient.refusal``.
    """

    def __init__(
        self,
        client: HttpClient,
        exchange: _Exchange,
        response: http.client.HTTPResponse | None,
        patience: Patience,
        longest: int,
        *,
        lines: bool,
    ) -> None:
        self._client = client
        self._exchange = exchange
        self._response = response
        self._patience = patience
        self._longest = longest
        self._events = self._parse_lines() if lines else self._parse()

    def __next__(self) -> dict[str, Any]:
        wait, left, now = self._client.limits.read_timeout, self._patience.seconds, time.monotonic()
        self._exchange.deadline = now + min(wait, left)
        late = "did not end its answer in time" if left < wait else f"sent no event for {wait:g} seconds"
        try:
            with self._client.errors(self._exchange, late):
                event = next(self._events, None)
        except _CancelledError:
            event = None
        self._patience.seconds -= time.monotonic() - now
        if event is None:
            self.close()
            raise StopIteration
        return event

    def finishing(self) -> None:
        """The last token has come: what follows has to end within ``answer_timeout``."""
        self._patience.seconds = min(self._patience.seconds, self._client.limits.answer_timeout)

    def close(self) -> None:
        """Close the connection, upon which servers abort the request."""
        if self._response is not None:
            self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parse(self) -> Iterator[dict[str, Any]]:
        """Server-sent events (WHATWG HTML, 9.2) as far as servers use them, and llama-server's lines of ``error``."""
        data = bytearray()
        for line in self._lines():
            name, _, value = line.partition(b":")
            if name in {b"data", b"error"}:
                data += value + b"\n"
                if len(data) > self._longest:
                    raise self._client.malformed(f"an event is longer than {self._longest} bytes")
            if not data or (line and name != b"error"):
                continue
            if data.strip() == b"[DONE]":
                return
            event = self._client.parsed(bytes(data))
            data.clear()
            if name == b"error" or (isinstance(event, dict) and "error" in event):
                raise self._client.refused(http.client.OK, event)
            yield self._object(event)

    def _parse_lines(self) -> Iterator[dict[str, Any]]:
        """Objects, one on each line; empty lines, and the end of the last one, may be there or not."""
        for line in self._lines(last=True):
            if line.strip():
                event = self._object(self._client.parsed(line))
                if event.get("error"):
                    raise self._client.refused(http.client.OK, event)
                yield event

    def _object(self, event: Any) -> dict[str, Any]:
        if not isinstance(event, dict):
            raise self._client.malformed("an event is not a JSON object")
        return event

    def _lines(self, *, last: bool = False) -> Iterator[bytes]:
        """The stream's lines, without their ends; with ``last`` also what comes after the last end of a line."""
        rest = bytearray()
        response = self._response
        while response is not None and (piece := response.read1(_PIECE)):
            first, *lines = piece.split(b"\n")
            rest += first
            if lines:
                yield bytes(rest).removesuffix(b"\r")
                yield from (line.removesuffix(b"\r") for line in lines[:-1])
                rest = bytearray(lines[-1])
            if len(rest) > self._longest:
                raise self._client.malformed(f"a line is longer than {self._longest} bytes")
        if response is not None and response.length:  # what is left of the length that the server has claimed
            raise http.client.IncompleteRead(b"", response.length)
        if last and rest:
            yield bytes(rest)


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")
