"""A llama-server of our own: started, waited for, and ended with the session or this process."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from polydraft.errors import EngineError, InvalidRequestError, ModelFormatError, OutOfMemoryError

from polydraft_llama_cpp.server.client import Client

__all__ = ["ServerProcess"]

_TAIL = 400
_PATIENCE = 10.0


class ServerProcess:
    """A running server on this machine's loopback, with a key of its own.

    Args:
        command: Program and flags, without host, port and key.
        seconds: How long it may take to load the model.

    Raises:
        ModelFormatError: It ended before it was ready; its last words are in the message.
        EngineError: It was not ready in time.
        OutOfMemoryError: It was killed while it loaded.
        InvalidRequestError: It does not know a flag.
    """

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        key = secrets.token_hex(16)
        port = _free_port()
        self._log = tempfile.NamedTemporaryFile(prefix="polydraft-llama-server-", suffix=".log", delete=False)  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LLAMA_API_KEY": key},
        )
        self._finalizer = weakref.finalize(self, _end, self._process, self._log.name)
        self.client = Client(f"http://127.0.0.1:{port}", key)
        try:
            self._wait(seconds)
        except BaseException:
            self.close()
            raise

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            code = self._process.poll()
            if code is not None:
                said = self.last_words()
                if code == -9:
                    raise OutOfMemoryError("llama-server was killed while it loaded.", "Give a smaller context_length.")
                if "invalid argument" in said:
                    raise InvalidRequestError(
                        f"llama-server does not take its command line. {said}",
                        "Look at extra_args; without any this llama-server is too old or too new.",
                    )
                raise ModelFormatError(
                    f"llama-server ended with code {code} before it was ready. {said}",
                    "Check the file; its architecture must be known to this llama-server.",
                )
            with contextlib.suppress(EngineError):
                if self.client.get("/health").get("status") == "ok":
                    return
            time.sleep(0.05)
        raise EngineError(
            f"llama-server was not ready after {seconds:g} seconds. {self.last_words()}",
            "Give engine_options={'start_seconds': ...} a larger value.",
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def check_alive(self) -> None:
        """Raise an ``EngineError`` with the process's last words if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise EngineError(
                f"llama-server has ended with code {code}. {self.last_words()}", "Load the session again."
            )

    def last_words(self) -> str:
        """The end of its log, as one line."""
        text = Path(self._log.name).read_text(encoding="utf-8", errors="replace")
        return " ".join(text.split())[-_TAIL:]

    def close(self) -> None:
        """End it. May be called twice."""
        self._finalizer()


def _end(process: subprocess.Popen[bytes], log: str) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    Path(log).unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
