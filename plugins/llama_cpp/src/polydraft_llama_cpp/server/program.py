"""The program ``llama-server``: where it is, its version, the flags it has, and how it is started."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from polydraft.checkpoints.contents import content_digest
from polydraft.engine_parts.serving import LOOPBACK, ServerProcess, free_port
from polydraft.errors import (
    BackendUnavailableError,
    DeviceError,
    InvalidRequestError,
    ModelFormatError,
    OutOfMemoryError,
    PolydraftError,
    SpeculationUnavailableError,
)
from polydraft.secrets import Secret
from polydraft_gguf.environment import needed_environment
from polydraft_gguf.resources import device_name
from polydraft_gguf.serving.client import Client

from polydraft_llama_cpp.server.options import KEY_VARIABLE, URL_VARIABLE, LlamaServerOptions

__all__ = [
    "HOW_TO_FIND",
    "NOT_FOUND",
    "SPEC_TYPES",
    "VARIABLE",
    "Program",
    "Server",
    "client",
    "find",
    "looked_at",
    "program",
    "start",
]

VARIABLE = "POLYDRAFT_LLAMA_SERVER"
"""Environment variable with the path of the program."""
NOT_FOUND = "No llama-server was found."
HOW_TO_FIND = f"Set {VARIABLE} to the path of llama-server, or {URL_VARIABLE} to the URL of a running one."
SPEC_TYPES = {"mtp": "draft-mtp", "draft-model": "draft-simple"}
_NEEDED = ("--spec-draft-model", "--spec-draft-n-max", "--spec-type")
_DEVICE = re.compile(r"^  ([A-Za-z]+\d+): .* MiB free\)$", re.MULTILINE)
"""A line of ``--list-devices``; a device without a number is not a GPU (BLAS)."""
_LIBRARY = re.compile(r"(llama|ggml|mtmd).*\.(so|dylib|dll)")
"""Libraries of llama.cpp: others may lie next to an installed program."""
_TIMEOUT = 60  # seconds
_LAST_WORDS = 400  # characters


@dataclass(frozen=True, slots=True)
class Program:
    """What the program reports about itself."""

    path: str
    version: str
    help: str
    devices: Mapping[str, str] = field(default_factory=dict)
    """Maps polydraft's device names (``cuda:0``) to llama-server's (``CUDA0``), for the GPUs that it sees."""

    @property
    def build(self) -> dict[str, str]:
        """What decides how it computes: its version, its program, and the libraries next to it or in ``../lib``."""
        found = Path(shutil.which(self.path) or self.path).resolve()
        folders = [folder for folder in (found.parent, found.parent.parent / "lib") if folder.is_dir()]
        libraries = {
            f"{number}/{file.name}": file
            for number, folder in enumerate(folders)
            for file in folder.iterdir()
            if _LIBRARY.search(file.name) and file.is_file()
        }
        return {"llama-server": f"{self.version} {content_digest({'program': found, **libraries})}"}

    def device(self, name: str) -> str | None:
        """llama-server's name for a device, ``none`` for the CPU; None for ``auto``, which leaves the choice to it.

        Raises:
            DeviceError: It does not see such a device.
        """
        if name == "auto":
            return None
        if name == "cpu":
            return "none"
        for known, own in self.devices.items():
            if name in {known, known.removesuffix(":0")}:
                return own
        raise DeviceError(
            f"The device {name} was asked for, and {self.path} sees: {', '.join(['cpu', *self.devices])}.",
            "Use a llama-server that was built for it.",
        )

    def check_drafter(self, kind: str) -> None:
        """Refuse a kind of drafter that this version cannot run.

        Raises:
            SpeculationUnavailableError: It lacks a flag: it is older (or newer) than the versions that were tested.
        """
        missing = [flag for flag in _NEEDED if not self.has(flag)]
        # The help lists the drafter types of this build on the line of the flag.
        types = next((line for line in self.help.splitlines() if line.lstrip().startswith("--spec-type")), "")
        if missing or SPEC_TYPES[kind] not in types:
            what = missing[0] if missing else f"--spec-type {SPEC_TYPES[kind]}"
            raise SpeculationUnavailableError(
                f"{self.path} ({self.version}) does not have {what}.",
                "Use a llama-server of 2026-10 or later (its commit 0c1e57098 was tested), or `drafter=None`.",
            )

    def has(self, flag: str) -> bool:
        """Whether the help text names a flag."""
        return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", self.help) is not None


def find() -> str | None:
    """The path that the environment variable gives, else that of ``llama-server`` on the PATH; None if neither.

    Raises:
        BackendUnavailableError: The variable holds a URL.
    """
    path = os.environ.get(VARIABLE)
    if path and path.startswith(("http://", "https://")):
        raise BackendUnavailableError(
            f"{VARIABLE} holds a URL, and names the program llama-server.",
            f"Set {URL_VARIABLE} to the URL of a running server, and unset {VARIABLE}.",
        )
    return path or shutil.which("llama-server")


def looked_at(path: str | None) -> tuple[str, ...]:
    """What decides which program is found, and what it says: the folders of the PATH, the program, its libraries'."""
    looked = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    if path is not None:
        found = Path(shutil.which(path) or path).resolve()
        looked += [str(found), str(found.parent), str(found.parent.parent / "lib")]
    return tuple(dict.fromkeys(looked))


@cache
def program(path: str) -> Program:
    """Ask a program for its version, flags and devices.

    Raises:
        BackendUnavailableError: It cannot be started, or is not llama-server.
    """
    version_text, help_text, device_text = (_run(path, flag) for flag in ("--version", "--help", "--list-devices"))
    version = re.search(r"version:\s*(\S.*)", version_text)
    if version is None or "--ctx-size" not in help_text:
        raise BackendUnavailableError(
            f"{path} is not llama-server: it reports the version {version_text.strip()[:80]!r}.", HOW_TO_FIND
        )
    devices = {device_name(own): own for own in _DEVICE.findall(device_text)}
    return Program(path, version[1].strip(), help_text, devices)


def _run(path: str, flag: str) -> str:
    try:
        done = subprocess.run([path, flag], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(f"{path} cannot be started: {error}", HOW_TO_FIND) from error
    return done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready: its client, and its process if it was started here."""

    client: Client
    process: ServerProcess | None = None

    def check_alive(self) -> None:
        """Raise if it was started here and has ended: see ``ServerProcess.check_alive``."""
        if self.process is not None:
            self.process.check_alive()

    def stop(self) -> None:
        """Stop it if it was started here. May be called twice."""
        if self.process is not None:
            try:
                self.process.stop()
            finally:  # also when Ctrl+C interrupts it
                self.process.discard_log()


def client(url: str, key: Secret | None, options: LlamaServerOptions, *, own: bool = False) -> Client:
    """A client of a llama-server. ``own``: it was started here, and is not reached through a proxy."""
    limits = options.limits()
    return Client(url, name="llama-server", key=key, key_variable=KEY_VARIABLE, limits=limits, own=own)


def start(command: Sequence[str], options: LlamaServerOptions) -> Server:
    """Start a server on the loopback interface, with a random API key unless one is given, and wait until it is ready.

    Raises:
        ModelFormatError: It ended before it was ready; its last words are in the message.
        EngineError: It was not ready in time.
        OutOfMemoryError: It was killed while it loaded the model.
        InvalidRequestError: It rejects a flag.
        BackendUnavailableError: It cannot be started.
    """
    key, port = options.given_key() or Secret(secrets.token_hex(16)), free_port()
    process = ServerProcess(
        [*command, "--host", LOOPBACK, "--port", str(port)],
        name="llama-server",
        port=port,
        environment=needed_environment() | {"LLAMA_API_KEY": key},
    )
    process.wait_until_ready(options.start_timeout, failure=_start_error)
    return Server(client(process.url, key, options, own=True), process)


def _start_error(code: int, log: str) -> PolydraftError:
    """Why a server ended before it was ready."""
    said = " ".join(log.split())[-_LAST_WORDS:]
    if code == -9:  # SIGKILL, as the kernel sends it when memory runs out
        return OutOfMemoryError("llama-server was killed while it loaded.", "Give a smaller `context_length`.")
    if "invalid argument" in said:
        return InvalidRequestError(
            f"llama-server rejects its command line. {said}",
            "Check extra_args; if there are none, this llama-server is too old or too new.",
        )
    return ModelFormatError(
        f"llama-server ended with code {code} before it was ready. {said}",
        "Check the file, and that this llama-server knows its architecture.",
    )
