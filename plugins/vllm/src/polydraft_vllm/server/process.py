"""A server that a session starts and stops."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.errors import EngineError, InvalidRequestError

from polydraft_vllm.start_errors import start_error

if TYPE_CHECKING:
    from polydraft.contract import ServerCommand

__all__ = ["LOOPBACK", "ServerProcess", "check_port", "free_port"]

LOOPBACK = "127.0.0.1"
_POLL = 0.5
_GRACE = 20.0
"""Seconds that a server has to end after it was asked to."""
_LOG_LINES = 12
_EXCEPTION = re.compile(
    r"^(?:\(.*?\) ERROR [^\]]*\] )?((?:[\w.]*(?:Error|Exception)|\w+\.py: error): .*)$", re.MULTILINE
)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken.

    Raises:
        InvalidRequestError: Somebody listens there, or the address is not this machine's.
    """
    try:
        with socket.create_server((host, port)):
            return
    except OSError as error:
        raise InvalidRequestError(
            f"The server cannot listen on {host}:{port}: {error.strerror or error}.", "Choose another port."
        ) from error


class ServerProcess:
    """A running server of ours. It ends with this process, however that ends.

    Args:
        command: What to run.
        port: Where it will listen, on the loopback interface.
        target: The target's name, for errors.
        key: The API key that it shall ask for; None: as this process's environment says.
    """

    def __init__(self, command: ServerCommand, port: int, target: str, key: str | None = None) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self._target = target
        folder = Path(tempfile.mkdtemp(prefix="polydraft-vllm-"))
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            # A group of its own: its workers end with it, and Ctrl+C in the app does not tear it down mid-answer.
            self._process = subprocess.Popen(
                command.arguments,
                env={**os.environ, **command.environment, **({"VLLM_API_KEY": key} if key else {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Where this process is killed, nothing of it can end the server: the watcher sees the pipe close.
        watcher = subprocess.Popen(
            ("sh", "-c", f"read -r _; kill -KILL -{self._process.pid}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Also where the session is never closed: at the latest when this process ends.
        self._finalizer = weakref.finalize(self, _kill_group, self._process, watcher, os.getpid())

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for its health check.

        Raises:
            PolydraftError: It ended before; what its log says is in the message.
            EngineError: It takes longer than ``seconds``.
        """
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to the loopback
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.running:
                raise start_error(RuntimeError(self._why()), self._target)
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                opener.open(f"{self.url}/health", timeout=5),
            ):
                return
            time.sleep(_POLL)
        self.stop()
        raise EngineError(
            f"The vLLM server of {self._target} was not ready within {seconds:.0f} seconds.",
            "Give start_timeout more, or look at its log: " + str(self.log),
        )

    def stop(self) -> None:
        """End it and its workers. May be called twice."""
        try:
            if self.running:
                self._signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)
        finally:  # an interrupt while waiting, too
            self._finalizer()

    def kill(self) -> None:
        """End it without warning, as a crash would."""
        self._finalizer()

    def discard_log(self) -> None:
        """Remove its log."""
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _why(self) -> str:
        """What its log says of its end: the first line that is a Python exception, or argparse's."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        # The engine's process says what went wrong; the server's then only that the engine did not start.
        named = [line for line in _EXCEPTION.findall(text) if "Engine core initialization failed" not in line]
        return named[0] if named else "\n".join(text.splitlines()[-_LOG_LINES:]) or "it ended at once"


def _kill_group(process: subprocess.Popen[bytes], watcher: subprocess.Popen[bytes], home: int) -> None:
    """Kill the server and its workers. A group whose leader has ended may still have some."""
    if os.getpid() != home:
        return  # a forked child ends; the server is its parent's
    watcher.kill()
    watcher.communicate()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
