"""A server in this process: its socket, its signals, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from polydraft import Session
from polydraft.engine_parts.serving import check_port
from polydraft.errors import InvalidRequestError, PolydraftError
from sse_starlette.sse import AppStatus

from polydraft_server.app import Api
from polydraft_server.protocol import Protocol
from polydraft_server.settings import KEY_VARIABLE, ServerSettings

__all__ = ["Server", "listen", "serve"]

_LARGEST_HEAD = 64 << 10
"""Bytes of a request's line and headers."""
_WARM_UP_TOKENS = 6
_LAST_WAIT = 1.0
"""Seconds that the session gets to close at a third signal."""
_AFTER_STOP = 5
"""Seconds that connections get to send what they were told at the end."""


def serve(load: Callable[[], Session], settings: ServerSettings, say: Callable[[str], None]) -> int:
    """Load a session and serve it until SIGINT or SIGTERM.

    Args:
        load: Loads the session, and loads it again if its engine's process ends.
        settings: Where, for whom, and how much at a time.
        say: Gets lines for the user.

    Returns:
        The exit code: 0, or 130 after Ctrl+C.

    Raises:
        InvalidRequestError: The address cannot be listened on, or others reach it and there is no key.
        PolydraftError: As ``load``.
    """
    with listen(settings) as listening:
        local = is_local(listening)

        def warm() -> Session:
            session = load()
            _warm_up(session)
            return session

        session = warm()
        api = Api(session, settings, warm, local)
        address, port = listening.getsockname()[:2]
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        if note := settings.note(session):
            say(note)
        if not local and settings.key is None:
            say(f"Warning: there is no key, and whoever reaches {where} can use the model.")
        what = f"{', '.join(api.names)} with {session.running.backend}"
        ready = f"Serving {what} at {where}/v1; a page to try it: {where}/; Ctrl+C stops it."
        return Server(api, listening, lambda: say(ready)).run_to_the_end()


def _warm_up(session: Session) -> None:
    """A few tokens both ways: what an engine does once is in no answer's time, nor in the page's speeds."""
    for speculate in ("auto", "off"):
        with contextlib.suppress(PolydraftError):  # whoever asks for the same is told
            session.generate("Hello", max_new_tokens=_WARM_UP_TOKENS, speculate=speculate)


def listen(settings: ServerSettings) -> socket.socket:
    """The socket of a server, bound but not listening: nobody connects before the model is loaded.

    Raises:
        InvalidRequestError: The port is taken, the address is not this machine's, or others reach it and there is no
            key.
    """
    check_port(settings.host, settings.port)
    try:
        found = socket.getaddrinfo(settings.host or None, settings.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(found[0], socket.SOCK_STREAM)
        try:
            if os.name == "posix":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(found[4])
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise _cannot_listen(settings, error) from error
    if settings.key is None and not settings.no_auth and not is_local(bound):
        bound.close()
        raise InvalidRequestError(
            f"Other machines can reach {settings.host}, and the server has no key.",
            f"Set the environment variable {KEY_VARIABLE}, or give --api-key-file FILE; --no-auth serves everyone.",
        )
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether a socket is bound to an address that only this machine reaches."""
    address: str = bound.getsockname()[0]
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class Server(uvicorn.Server):
    """uvicorn's server, which lets generations end before it stops.

    Args:
        api: What it serves.
        listening: Its bound socket.
        started_up: Called once it listens.
    """

    def __init__(self, api: Api, listening: socket.socket, started_up: Callable[[], None] = lambda: None) -> None:
        self.api = api
        self._started_up = started_up
        self.interrupted = False
        """Whether Ctrl+C stopped it."""
        self._listening = listening
        config = uvicorn.Config(
            api.app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            # Any client could name another address as its own.
            proxy_headers=False,
            h11_max_incomplete_event_size=_LARGEST_HEAD,
            timeout_graceful_shutdown=_AFTER_STOP,
        )
        super().__init__(config)

    def run_to_the_end(self) -> int:
        """Serve until it is stopped; then the session is closed. Returns the exit code."""
        # sse-starlette would end all streams at the first signal; ``Api.stop`` gives them their time.
        AppStatus.enable_automatic_graceful_drain = False
        with self._handled_signals():
            try:
                asyncio.run(self.serve([self._listening]))
            except OSError as error:  # another program began to listen there while the model was loaded
                raise _cannot_listen(self.api.settings, error) from error
            finally:
                self.api.served.close_now()
        return 130 if self.interrupted else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._started_up()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: no new requests; those under way get their time, in which it still listens, to say that it stops."""
        await self.api.stop()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves this out then, and the app would end with a traceback
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WAIT):
                    await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: stop; at a second one, without waiting for answers; at a third, for nothing."""
        self.interrupted |= sig == signal.SIGINT
        self.force_exit = self.api.hurry
        self.api.hurry = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled for longer than it serves."""
        yield

    @contextlib.contextmanager
    def _handled_signals(self) -> Iterator[None]:
        """Handle signals until the session is closed, too. They are not raised again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _cannot_listen(settings: ServerSettings, error: OSError) -> InvalidRequestError:
    return InvalidRequestError(
        f"The server cannot listen on {settings.host}:{settings.port}: {error.strerror or error}.",
        "Choose another port or host.",
        argument="port",
    )
