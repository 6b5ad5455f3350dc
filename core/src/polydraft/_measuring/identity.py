"""What a measurement holds for, and the memory that it took."""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from polydraft._measuring.bench import MeasuredWeights
from polydraft._registry.versions import installed_version
from polydraft.contract.backend import EngineOptions
from polydraft.hardware import cpu_model
from polydraft.secrets import Secret, names_a_secret
from polydraft.verification._fingerprint import fingerprint, known_fingerprint, state_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polydraft._plugins import PluginHost
    from polydraft._registry.resolver import Prepared
    from polydraft._session.session import Session
    from polydraft.contract.records import BackendRecord
    from polydraft.contract.requests import HubOptions, ModelSource

__all__ = [
    "device_peak",
    "hardware_in_words",
    "hardware_of",
    "installed",
    "name_of",
    "options_of",
    "peak_memory",
    "same_weights",
    "weights_of",
]


class _Ran(Protocol):
    """A row of a benchmark or of a tuning."""

    @property
    def device(self) -> str: ...

    @property
    def hardware(self) -> str: ...


def name_of(source: ModelSource) -> str:
    """A model's name that does not depend on the current folder."""
    return str(source.path.resolve()) if source.kind == "local" and source.path else source.id


def weights_of(source: ModelSource, hub: HubOptions) -> MeasuredWeights:
    """The identity of a model's files; reads every byte the first time."""
    return MeasuredWeights(id=name_of(source), fingerprint=fingerprint(source, hub), state=_state(source, hub))


def same_weights(kept: MeasuredWeights, source: ModelSource, hub: HubOptions) -> bool:
    """Whether a model's files are those that were measured. No large file is read.

    They are if names, inodes, sizes and times are the same. If not, as after a copy, their bytes count, as far as they
    are known from before: ``polydraft verify``, ``tune`` and ``load(verified=...)`` keep digests of what they read.
    """
    state = _state(source, hub)
    if state and state == kept.state:
        return True
    return bool(kept.fingerprint) and known_fingerprint(source, hub) == kept.fingerprint


def _state(source: ModelSource, hub: HubOptions) -> str:
    found = state_of(source, hub)
    return hashlib.sha256(repr(found).encode()).hexdigest() if found else ""


def installed(host: PluginHost, record: BackendRecord) -> dict[str, str]:
    """Version and build of polydraft, of the backend's plugin, and of what it requires.

    The build is a hash over the list of hashes that the installer wrote. Unlike a verification, a speed is not
    spoilt by an edited line, so files are not looked at: this takes some milliseconds.
    """
    plugins = [status.distribution for status in host.statuses() if record.name in status.backends]
    names = {"polydraft", record.engine, *(name.strip() for key in record.requires for name in key.split("|"))}
    if home := host.home(record.name):
        # Each installation into an environment has its own number and time.
        made = f"{home.build} of {home.installed}"
        return {name: f"{home.versions[name]} {made}" for name in sorted(names) if name in home.versions}
    found = {}
    for name in sorted(names | {name for name in plugins if name}):
        if version := installed_version(name):
            found[name] = f"{version} {_build(name)}".strip()
    return found


def _build(name: str) -> str:
    try:
        listed = distribution(name).read_text("RECORD")
    except (PackageNotFoundError, OSError):
        return ""
    return hashlib.sha256(listed.encode()).hexdigest()[:12] if listed else ""


def hardware_of(prepared: Prepared) -> str:
    """The processor, and the devices that the backend sees."""
    devices = prepared.state.diagnosis.devices if prepared.state.diagnosis else ()
    seen = [f"{device.name} {device.description}".strip() for device in devices if device.name != "cpu"]
    return "; ".join([cpu_model(), *seen])


def hardware_in_words(processor: str, rows: Iterable[_Ran]) -> str:
    """The processor, and the devices that the rows ran on, without what tells two machines of a kind apart."""
    devices = [part for row in rows if not row.device.startswith("cpu") for part in row.hardware.split("; ")[1:]]
    return "; ".join(part.partition(" [")[0] for part in dict.fromkeys([processor, *devices]))


def options_of(given: Mapping[str, Any] | EngineOptions | None) -> dict[str, Any]:
    """Engine options as data, without secrets."""
    if isinstance(given, EngineOptions):
        given = given.model_dump(mode="json", exclude_unset=True)
    return {
        name: value if isinstance(value, str | int | float | bool | None) else repr(value)
        for name, value in (given or {}).items()
        if not isinstance(value, Secret) and not names_a_secret(name)
    }


def peak_memory() -> int | None:
    """Peak of the resident memory of this process in bytes, with its living children; None where it is not known."""
    if sys.platform != "linux":
        if sys.platform == "win32":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    # Not ``getrusage``: its peak is inherited from the process that started this one.
    return sum(filter(None, map(_peak_of, ["self", *_descendants("self")]))) or None


def _peak_of(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


def _descendants(process: str) -> list[str]:
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = path.read_text(encoding="ascii").split()
        except OSError:
            continue
        found += [*children, *(one for child in children for one in _descendants(child))]
    return found


def device_peak(session: Session) -> int | None:
    """Peak of the device's memory in bytes, where the engine tells."""
    told = getattr(session.engine, "peak_memory_bytes", None)
    found = told() if callable(told) else None
    return found if isinstance(found, int) else None
