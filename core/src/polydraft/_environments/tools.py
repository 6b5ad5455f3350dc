"""The two programs that make environments and install into them: uv where it is installed, else venv and pip."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path

from polydraft._environments.credentials import settings_of_pip

__all__ = ["Pip", "Uv", "python_of", "tool_here", "uv_here"]


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


class Pip:
    """venv and pip, which reads the user's own settings. Commands are the program and its arguments."""

    name = "pip"

    @property
    def environ(self) -> dict[str, str]:
        """Variables that its commands need."""
        retries = {"PIP_RETRIES": "1"} if _pip_never_retries() else {}
        return {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0", **retries}

    def make(self, folder: Path, program: str, *, compiles: bool) -> list[str]:
        """Make an environment with an interpreter; with pip in it if something is to be compiled."""
        return [program, "-I", "-m", "venv", str(folder)]

    def install(
        self, python: Path, what: list[str], constraints: Path, *, indexes: list[str], wheels: list[Path]
    ) -> list[str]:
        """Install requirements.

        Args:
            python: The environment's interpreter.
            what: Requirements; ``-e`` before a folder installs its code where it lies.
            constraints: A file of versions.
            indexes: Package indexes, besides the user's.
            wheels: Folders of wheels.
        """
        # Byte code is compiled on first import: most of torch is never imported.
        command = [str(python), "-I", "-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
        further = [word for index in indexes for word in ("--extra-index-url", index)]
        found = [word for folder in wheels for word in ("--find-links", str(folder))]
        return [*command, "-c", str(constraints), *further, *found, *what]

    def remove(self, python: Path, what: list[str]) -> list[str]:
        """Remove distributions, whether they are there or not."""
        return [str(python), "-I", "-m", "pip", "uninstall", "--yes", *what]


class Uv:
    """uv, with pip's settings for indexes where it has none of its own.

    Args:
        program: Its path.
    """

    name = "uv"

    def __init__(self, program: str) -> None:
        self._program = program

    @property
    def environ(self) -> dict[str, str]:
        """Variables that its commands need."""
        certificates = _settings_of_pip()[1]
        return {"UV_NO_PROGRESS": "1", **({"SSL_CERT_FILE": certificates} if certificates else {})}

    def make(self, folder: Path, program: str, *, compiles: bool) -> list[str]:
        """As ``Pip.make``."""
        # With pip, which makes wheels: uv does not.
        seeded = ["--seed"] if compiles else []
        return [self._program, "venv", "--no-project", *seeded, "--python", program, str(folder)]

    def install(
        self, python: Path, what: list[str], constraints: Path, *, indexes: list[str], wheels: list[Path]
    ) -> list[str]:
        """As ``Pip.install``."""
        # As pip does, of all indexes the best version: with uv's own rule torch's index would hide the others.
        command = [self._program, "pip", "install", "--python", str(python), "--index-strategy", "unsafe-best-match"]
        further = [word for index in indexes for word in ("--extra-index-url", index)]
        found = [word for folder in wheels for word in ("--find-links", str(folder))]
        return [*command, "-c", str(constraints), *_settings_of_pip()[0], *further, *found, *what]

    def remove(self, python: Path, what: list[str]) -> list[str]:
        """As ``Pip.remove``."""
        return [self._program, "pip", "uninstall", "--python", str(python), *what]


def uv_here() -> str | None:
    """The program uv; None if it is not installed."""
    return shutil.which("uv")


def tool_here() -> Pip | Uv:
    """uv where it is installed, else pip."""
    program = uv_here()
    return Pip() if program is None else Uv(program)


_OF_PIP = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "no-index": "--no-index",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
"""pip's settings, and uv's options for the same."""
_OF_UV = ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")


@cache
def _pip_never_retries() -> bool:
    """Whether pip is set to no retry: then it does not say that an index cannot be reached, but finds a conflict."""
    return ("retries", ["0"]) in settings_of_pip(sys.executable)


@cache
def _settings_of_pip() -> tuple[list[str], str]:
    """uv's options for what pip is set to, and the file of certificates that it is set to."""
    if any(name in os.environ for name in _OF_UV):
        return [], ""
    options, certificates = list[str](), ""
    for setting, values in settings_of_pip(sys.executable):
        if setting == "cert":
            certificates = values[0]
        elif setting == "no-index":
            options += ["--no-index"] if values[0].lower() in {"1", "true", "yes", "on"} else []
        elif setting in _OF_PIP:
            options += [word for one in values for word in (_OF_PIP[setting], one)]
    return options, certificates
