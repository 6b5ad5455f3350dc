"""What ``polydraft doctor`` finds out: this machine, the backends, the plugins."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft._plugins import default_host
from polydraft._registry.backends import known_backends
from polydraft._registry.describe import describe_backends, plugins_without_backend
from polydraft._registry.versions import VersionLookup, installed_version
from polydraft.contract.records import CONTRACT_VERSION

if TYPE_CHECKING:
    from polydraft._plugins import PluginHost, PluginStatus
    from polydraft._registry.backends import KnownBackend
    from polydraft._registry.describe import BackendDescription

__all__ = ["Findings", "Machine", "examine", "look_at_machine"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where this runs."""

    polydraft: str
    contract_version: int
    python: str
    executable: str
    system: str
    cpus: int
    memory_bytes: int | None
    free_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the report says."""

    machine: Machine
    backends: tuple[BackendDescription, ...]
    missing: tuple[KnownBackend, ...]
    """Backends that are known by name, but not installed."""
    plugins: tuple[PluginStatus, ...]
    """Plugins that are broken or disabled."""
    notes: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether at least one backend can run."""
        return any(found.state.usable for found in self.backends)


def examine(host: PluginHost | None = None, *, lookup: VersionLookup = installed_version) -> Findings:
    """Look at this machine and at all backends. Loads no weights and needs no network.

    Args:
        host: The plugins; None: the installed ones.
        lookup: Gives installed versions.
    """
    host = default_host() if host is None else host
    installed = describe_backends(host, lookup=lookup)
    broken = plugins_without_backend(host)
    # A broken plugin is installed: what mends it is not the command that installs it.
    there = {found.state.record.name for found in installed} | {name for status in broken for name in status.backends}
    there |= {status.name for status in broken}
    return Findings(
        machine=look_at_machine(),
        backends=tuple(installed),
        missing=tuple(known for known in known_backends() if known.name not in there),
        plugins=tuple(broken),
        notes=tuple(host.notes()),
    )


def look_at_machine() -> Machine:
    """Versions, processors and memory."""
    total, free = _memory()
    return Machine(
        polydraft=version("polydraft"),
        contract_version=CONTRACT_VERSION,
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=total,
        free_memory_bytes=free,
    )


def _memory() -> tuple[int | None, int | None]:
    """Bytes in all, and bytes that may be had; None where the system does not say (macOS tells no free ones)."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        total = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except OSError:
        free = None
    return total, free
