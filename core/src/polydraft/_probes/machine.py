"""What a diagnosis depends on, read in milliseconds: packages, hardware, drivers and environment variables."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polydraft.hardware import cpu_model
from polydraft.secrets import names_a_secret

__all__ = ["code", "file_state", "hardware", "packages", "variables"]

_CHANGING = re.compile(
    r"_|PWD|OLDPWD|SHLVL|TERM|TERM_.*|COLORTERM|COLUMNS|LINES|LS_COLORS|LESS.*|PS\d|HIST.*|WINDOWID|SSH_.*|DISPLAY|"
    r"DBUS_.*|XDG_SESSION_.*|GPG_.*|TMUX.*|STY|VTE_VERSION|PAGER|EDITOR|VISUAL|INVOCATION_ID|JOURNAL_STREAM|PYTEST_.*|"
    r"XAUTHORITY|WAYLAND_DISPLAY|SESSION_MANAGER|ICEAUTHORITY|DESKTOP_.*|SYSTEMD_EXEC_PID|KITTY_.*|ITERM_.*|KONSOLE_.*|"
    r"ALACRITTY_.*|WEZTERM_.*|VSCODE_.*|"
    # How many threads compute and what is printed decide nothing about what an engine can do.
    r"(?:OMP|MKL|OPENBLAS|NUMEXPR|RAYON)_NUM_THREADS|TOKENIZERS_PARALLELISM|NO_COLOR|FORCE_COLOR|HF_HUB_VERBOSITY"
)
"""Variables that differ from start to start: of a terminal, a desktop, a shell or a test runner, and of threads and
output. All others count."""
_DEVICES = ("nvidia*", "nvidia-caps/*", "kfd", "dri/*", "dxg")
"""GPUs and what gives access to them, below /dev."""
_DRIVERS = (
    "/proc/driver/nvidia/version",
    "/proc/driver/nvidia/gpus/*/information",
    "/sys/module/nvidia/version",
    "/sys/module/amdgpu/version",
    "/sys/module/amdgpu/srcversion",
    "/sys/bus/pci/devices/*/class",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/random/boot_id",
)
_LINKER = ("/etc/ld.so.cache", "/etc/ld.so.preload")
"""Rewritten whenever system libraries are installed, such as those of a driver."""
_MODULES = {".py", ".so", ".pyd", ".pth", ".zip", ".dll", ".dylib"}
_METADATA = {".dist-info", ".egg-info"}


def file_state(path: str | Path) -> list[int] | None:
    """What changes with a file or a folder's list of files; None where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - thousands of files
    except OSError:
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def variables() -> list[tuple[str, str]]:
    """The environment variables but for those that differ from start to start, and secrets."""
    return sorted(
        (name, value)
        for name, value in os.environ.items()
        if not _CHANGING.fullmatch(name) and not names_a_secret(name)
    )


def hardware() -> list[Any]:
    """The processor, the GPUs that this user may use, their drivers, and the system's start."""
    devices = []
    for path in sorted(found for pattern in _DEVICES for found in Path("/dev").glob(pattern)):
        state = file_state(path)
        devices.append((str(path), state and state[:2], os.access(path, os.R_OK | os.W_OK)))
    drivers = [(str(path), _text(path)) for pattern in _DRIVERS for path in sorted(Path("/").glob(pattern[1:]))]
    return [platform.platform(), cpu_model(), devices, drivers, [(name, file_state(name)) for name in _LINKER]]


def packages() -> list[Any]:
    """The interpreter, and what may be imported.

    A folder from which nothing can be is left out: ``python -m`` puts the current one on the path.
    """
    program = os.path.realpath(sys.executable)
    folders = [found for found in map(_folder, sys.path) if found[1] != _NOTHING]
    return [sys.executable, sys.version, program, file_state(program), folders]


def _folder(entry: str) -> tuple[str, str, list[int] | None]:
    """A folder of the path: the names that may be imported from it, and its state where packages are installed."""
    try:
        with os.scandir(entry or ".") as found:
            names = sorted(
                one.name
                for one in found
                if os.path.splitext(one.name)[1] in _MODULES | _METADATA  # noqa: PTH122 - many names
                or (one.name.isidentifier() and os.path.exists(f"{one.path}/__init__.py"))  # noqa: PTH110
            )
    except OSError:  # a ZIP file, or nothing
        return entry, "", file_state(entry)
    # A package that is installed again, with the same version, changes the folder and no name in it.
    installed = any(name.endswith(tuple(_METADATA)) for name in names)
    return entry, _digest(names), file_state(entry) if installed else None


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


_NOTHING = _digest(())


def code(package: str) -> str:
    """A digest of the names, sizes and times of a package's own files; empty where it cannot be found."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return ""
    if spec is None:
        return ""
    found: list[Any] = [file_state(spec.origin)] if spec.origin else []
    for top in spec.submodule_search_locations or ():
        for folder, _, files in os.walk(top):
            for name in files:
                if name.endswith((".py", ".toml", ".so", ".pyd")):
                    path = os.path.join(folder, name)  # noqa: PTH118 - many files
                    found.append((path, file_state(path)))
    return hashlib.sha256(repr(sorted(found, key=repr)).encode("utf-8", "surrogateescape")).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return type(error).__name__
