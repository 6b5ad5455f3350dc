"""llama.cpp's server in this process."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import subprocess
import sys
import weakref
from typing import Any

from polydraft.engine_parts.http_client import HttpLimits
from polydraft.errors import ModelFormatError
from polydraft.secrets import Secret
from polydraft_gguf.serving.client import Client

from polydraft_xllamacpp.settings import ServerSettings
from polydraft_xllamacpp.workarounds import let_forked_processes_exit

__all__ = ["InProcessServer", "command"]

_ERROR = re.compile(r"^[\d.]+ E (.+)$", re.MULTILINE)
"""A line of llama.cpp's log: time, level, message."""
_LONGEST = 400  # characters
_REASON_TIMEOUT = 120.0  # seconds


class InProcessServer:
    """A server on a free port of the loopback interface, with a random API key. It starts now.

    It has no function that stops it: it stops when its Python object is freed, and then waits for its threads. In a
    forked process, which does not have these threads, the object is never freed.

    Args:
        settings: What it runs.
        name: What to call the model in messages.

    Raises:
        ModelFormatError: llama.cpp cannot load the model; its own words are in the message.
        DeviceError: xllamacpp does not see the device.
    """

    def __init__(self, settings: ServerSettings, name: str) -> None:
        import xllamacpp as engine

        let_forked_processes_exit()
        key = Secret(secrets.token_hex(16))
        params = settings.params(key)
        try:
            server = engine.Server(params)
        except RuntimeError as error:  # "Failed to init server, please check the input params."
            raise ModelFormatError(
                f"llama.cpp cannot load {name}: {_reason(settings) or error}",
                "Check the file, and that this version of xllamacpp knows its architecture.",
            ) from error
        url = server.listening_address
        self.client = Client(url, name="llama.cpp's server", key=key, limits=HttpLimits(), own=True)
        self._free = weakref.finalize(self, _free, [server], os.getpid())
        del server

    def check_alive(self) -> None:
        """Nothing: it ends only with this process."""

    def stop(self) -> None:
        """Stop it, and free the model. May be called twice."""
        self._free()


def command(settings: ServerSettings) -> list[str]:
    """The command that runs the same server in a process of its own."""
    return [sys.executable, "-m", "polydraft_xllamacpp.program", *settings.arguments()]


def _free(box: list[Any], home: int) -> None:
    """Free the server that ``box`` holds, unless this is a forked process."""
    if os.getpid() != home:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(box[0]))
    box.clear()


def _reason(settings: ServerSettings) -> str:
    """Why a server does not start: it says so on standard error only, so another process starts it again."""
    try:
        done = subprocess.run(
            command(settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_REASON_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    errors = _ERROR.findall(done.stderr)  # the first is the cause, the others its consequences
    return errors[0].strip()[:_LONGEST] + "." if errors else ""
