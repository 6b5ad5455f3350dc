"""Where ``llama-server`` is, which version, and which flags it knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from polydraft.errors import BackendUnavailableError, DeviceError, SpeculationUnavailableError

from polydraft_llama_cpp.bindings import device_name

__all__ = ["VARIABLE", "Program", "find", "is_url", "program"]

VARIABLE = "POLYDRAFT_LLAMA_SERVER"
"""Path of the program, or the URL of a running server."""
SPEC_TYPES = {"mtp": "draft-mtp", "draft-model": "draft-simple"}
_NEEDED = ("--spec-draft-model", "--spec-draft-n-max", "--spec-type")
_DEVICE = re.compile(r"^  ([A-Za-z]+\d+): .* MiB free\)$", re.MULTILINE)
"""A line of ``--list-devices``; what has no number is no GPU (BLAS)."""
_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Program:
    """What the program says of itself."""

    path: str
    version: str
    help: str
    devices: Mapping[str, str] = field(default_factory=dict)
    """The GPUs that it sees, by polydraft's names (``cuda:0``), with its own (``CUDA0``)."""

    def device(self, name: str) -> str | None:
        """Its own word for a device, ``none`` for the CPU; None for ``auto``, which is its own choice.

        Raises:
            DeviceError: It sees no such device.
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
        """Check that this version can run a drafter of a kind.

        Raises:
            SpeculationUnavailableError: A flag is missing: it is older (or newer) than what is known.
        """
        missing = [flag for flag in _NEEDED if not self.has(flag)]
        types = next((line for line in self.help.splitlines() if line.lstrip().startswith("--spec-type")), "")
        if missing or SPEC_TYPES[kind] not in types:
            what = missing[0] if missing else f"--spec-type {SPEC_TYPES[kind]}"
            raise SpeculationUnavailableError(
                f"{self.path} ({self.version}) does not know {what}.",
                "Use a llama-server of 2026-10 or later (its commit 0c1e57098 was tested), or drafter=None.",
            )

    def has(self, flag: str) -> bool:
        """Whether the help text names a flag."""
        return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", self.help) is not None


def find() -> str | None:
    """The path or URL that the variable names, else ``llama-server`` on the path; None if there is neither."""
    return os.environ.get(VARIABLE) or shutil.which("llama-server")


def is_url(place: str) -> bool:
    """Whether a server is running there already."""
    return place.startswith(("http://", "https://"))


@cache
def program(path: str) -> Program:
    """Ask a program for its version, flags and devices.

    Raises:
        BackendUnavailableError: It cannot be started, or is no llama-server.
    """
    said = [_run(path, flag) for flag in ("--version", "--help", "--list-devices")]
    version = re.search(r"version:\s*(\S.*)", said[0])
    if version is None or "--ctx-size" not in said[1]:
        raise BackendUnavailableError(
            f"{path} is no llama-server: it says {said[0].strip()[:80]!r} of its version.",
            f"Set {VARIABLE} to the path of llama-server, or to the URL of a running one.",
        )
    return Program(path, version[1].strip(), said[1], {device_name(own): own for own in _DEVICE.findall(said[2])})


def _run(path: str, flag: str) -> str:
    try:
        done = subprocess.run([path, flag], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnavailableError(
            f"{path} cannot be started: {error}", f"Set {VARIABLE} to the path of llama-server."
        ) from error
    return done.stdout + done.stderr
