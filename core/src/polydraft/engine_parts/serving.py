"""An engine's server as a child process: started, awaited, and ended with this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polydraft.engine_parts.http_client import HttpClient, HttpLimits
from polydraft.errors import BackendUnavailableError, EngineError, InvalidRequestError, PolydraftError
from polydraft.files import system_error, system_errors
from polydraft.secrets import Secret, revealed

__all__ = ["LOOPBACK", "ServerProcess", "check_port", "free_port"]

LOOPBACK = "127.0.0.1"
"""Address of this machine that no other machine reaches."""
_POLL = 0.1
"""Polling interval in seconds, while a server starts."""
_HEALTH_TIMEOUT = 5.0
"""Seconds for one answer of a health check."""
_GRACE = 20.0
"""Seconds that a server has to end after SIGTERM."""
# Characters of the end of a log that an error shows.
_LAST_WORDS = 400
_LONGEST_LOG = 1 << 20
"""Bytes of the end of a log that are read."""


def free_port() -> int:
    """A port of the loopback interface that is free now; another program may take it before a server does."""
    with system_errors("No port can be looked for"), socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


def check_port(host: str, port: int) -> None:
    """Refuse an address that a server cannot listen on, before it loads the model.

    Args:
        host: Name or address (IPv4 or IPv6) of this machine.
        port: Port to listen on.

    Raises:
        InvalidRequestError: The port is taken, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        # With SO_REUSEADDR on POSIX, as servers do: a port in TIME_WAIT counts as free.
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise InvalidRequestError(
            f"The server cannot listen on {host}:{port}: {error.strerror or error}.",
            "Choose another port or host.",
            argument="port",
        ) from error


class ServerProcess:
    """A server that runs as a child of this process and ends with it.

    On POSIX the server and its own children form a separate process group: Ctrl+C in the app does not interrupt them
    in the middle of an answer, and they end together. They are killed when this object is deleted and when the
    interpreter exits; a small process watches this one, and kills them if this one is killed. In a forked child of this
    process the object has no effect.

    On Windows Ctrl+C does not reach the server either, but nothing ends it when this process is killed, and its own
    children are not ended with it.

    Args:
        command: The program and its arguments, with the port (and ``LOOPBACK`` as host) among them.
        name: What errors call the server: ``llama-server``, ``The vLLM server of org/model``.
        port: Where it will listen, on the loopback interface.
        environment: Variables in addition to this process's. An API key goes here, as a ``Secret``: command lines can
            be read by others, and what the server logs of it is not shown.

    Raises:
        BackendUnavailableError: The program cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, name: str, port: int, environment: Mapping[str, str | Secret] | None = None
    ) -> None:
        self.name = name
        self.url = f"http://{LOOPBACK}:{port}"
        given = environment or {}
        self._secrets = [value for value in given.values() if isinstance(value, Secret)]
        try:
            folder = Path(tempfile.mkdtemp(prefix="polydraft-server-"))  # mode 0700
        except OSError as error:
            raise system_error(error, f"{name} cannot be started") or BackendUnavailableError(
                f"{name} cannot be started, its log needs a folder: {error.strerror or error}.",
                "Set TMPDIR to a folder that can be written.",
            ) from error
        self.log = folder / "server.log"
        """The server's standard output and error."""
        try:
            # For this user only: servers may log prompts.
            self.log.touch(mode=0o600)
            with self.log.open("wb") as log:
                self._process = _start(
                    command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **revealed(given)}
                )
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise system_error(error, f"{name} cannot be started") or BackendUnavailableError(
                f"{name} cannot be started ({command[0]}): {error.strerror or error}.", "Check the program's path."
            ) from error
        self._home = os.getpid()
        # Finalizers also run when the interpreter exits, newest first: the server ends before its log is removed.
        self._discard_log = weakref.finalize(self, _remove, folder, self._home)
        try:
            watcher = _watch(self._process, folder)
        except OSError as error:
            _kill(self._process, None, self._home)
            self._discard_log()
            raise system_error(error, f"{name} cannot be watched over") or BackendUnavailableError(
                f"{name} cannot be watched over: {error.strerror or error}.", "End some processes, and try again."
            ) from error
        self._end = weakref.finalize(self, _kill, self._process, watcher, self._home)

    @property
    def pid(self) -> int:
        """Its process id; on POSIX the id of its process group, too."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_until_ready(
        self, seconds: float, *, health: str = "/health", failure: Callable[[int, str], PolydraftError] | None = None
    ) -> None:
        """Wait until the server answers ``health`` with HTTP status 200. If this raises, the server has been stopped.

        Args:
            seconds: How long to wait at most.
            health: Path of its health check, which must not need a key.
            failure: Makes the error for a server that ended before it was ready, from its exit code (negative: the
                signal that ended it) and the text of its log. None: an ``EngineError`` with the last words.

        Raises:
            PolydraftError: It ended before it was ready.
            EngineError: It was not ready in time. Its log is kept, and named in the message.
        """
        limits = HttpLimits(connect_timeout=_HEALTH_TIMEOUT, answer_timeout=_HEALTH_TIMEOUT)
        client = HttpClient(self.url, name=self.name, limits=limits, own=True)
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                code = self._process.poll()
                if code is not None:
                    raise failure(code, self._log_text()) if failure else self._ended(code, "before it was ready")
                with contextlib.suppress(PolydraftError):  # no connection, or another status
                    client.get(health)
                    return
                time.sleep(_POLL)
            # The message names the log, so it must stay.
            self._discard_log.detach()
            raise EngineError(
                f"{self.name} was not ready within {seconds:g} seconds.",
                f"Give `start_timeout` a larger value, or look at its log: {self.log}",
            )
        except BaseException:
            self.stop()
            raise

    def check_alive(self) -> None:
        """Raise if the server has ended.

        Raises:
            EngineError: It has ended; the message holds its last words.
        """
        code = self._process.poll()
        if code is not None:
            raise self._ended(code, "unexpectedly")

    def last_words(self) -> str:
        """The end of its log as one line; empty if it has written nothing, or after ``discard_log``."""
        return " ".join(self._log_text().split())[-_LAST_WORDS:]

    def stop(self) -> None:
        """End it and its children: by SIGTERM, and after 20 seconds by SIGKILL. May be called twice."""
        try:
            if self._home == os.getpid() and self.alive:
                _signal(self._process, "SIGTERM")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)
        finally:  # also when the wait is interrupted
            self._end()

    def kill(self) -> None:
        """End it and its children at once, as a crash would."""
        self._end()

    def discard_log(self) -> None:
        """Remove its log. Without this call it is removed when this object is deleted or the interpreter exits."""
        self._discard_log()

    def _log_text(self) -> str:
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _LONGEST_LOG))
            text = log.read(_LONGEST_LOG).decode("utf-8", "replace")
        for secret in self._secrets:
            text = secret.hidden_in(text)
        return text

    def _ended(self, code: int, when: str) -> EngineError:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return EngineError(f"{self.name} {how} {when}. {self.last_words()}".strip(), "Load the session again.")


def _start(command: Sequence[str], **pipes: Any) -> subprocess.Popen[bytes]:
    """Start a process that a terminal's Ctrl+C does not reach."""
    if sys.platform == "win32":
        pipes["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        pipes["start_new_session"] = True
    return subprocess.Popen(command, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **pipes})


def _signal(server: subprocess.Popen[bytes], name: str) -> None:
    """Send a signal to the server's group; Windows has neither and ends the process."""
    if sys.platform == "win32":
        server.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.Signals[name])


def _watch(server: subprocess.Popen[bytes], folder: Path) -> subprocess.Popen[bytes] | None:
    """A process that kills the server's group and removes its log once the pipe from here closes; None on Windows."""
    watcher: subprocess.Popen[bytes] | None = None
    if sys.platform != "win32":
        # ``read`` returns once the pipe closes, even if this process is killed. -pid: the whole process group.
        script = f'read -r _; kill -KILL -{server.pid}; rm -rf "$1"'
        watcher = _start(("sh", "-c", script, "sh", str(folder)), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        _watchers.add(watcher)
    return watcher


# Weak: a watcher belongs to the finalizer that ends it.
_watchers: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()


def _close_pipes() -> None:
    """A forked child must not hold the pipes open after this process has ended."""
    for watcher in _watchers:
        assert watcher.stdin is not None
        watcher.stdin.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_pipes)


def _kill(server: subprocess.Popen[bytes], watcher: subprocess.Popen[bytes] | None, home: int) -> None:
    """Kill the server's group. One whose leader has ended may still have members."""
    if os.getpid() != home:
        return  # this is a forked child, and the server its parent's
    if watcher is not None:
        # The watcher first: later its signal could hit a process group that has been given the same id.
        watcher.kill()
        watcher.communicate()
    _signal(server, "SIGKILL")
    # Reaped, so that no zombie is left.
    server.wait()


def _remove(folder: Path, home: int) -> None:
    if os.getpid() == home:
        shutil.rmtree(folder, ignore_errors=True)
