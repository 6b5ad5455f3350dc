"""``polydraft.backends()``, ``polydraft.devices()`` and ``polydraft.pairs()``: what there is on this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from polydraft._numbers import as_size
from polydraft._registry.describe import (
    BackendDescription,
    PairDescription,
    describe_backends,
    describe_pairs,
    missing_backends,
    plugins_without_backend,
    surviving_host,
)
from polydraft._shown import Listing
from polydraft.contract.records import DeviceRecord, DrafterKind, Record

__all__ = ["BackendInfo", "DeviceInfo", "PairInfo", "backends", "devices", "pairs"]


class BackendInfo(Record):
    """A backend on this machine."""

    name: str = Field(description="What ``load(backend=...)`` takes.")
    summary: str = ""
    installed: bool
    usable: bool = Field(description="Whether it can run here.")
    only_if_named: bool = Field(
        default=False, description="``auto`` never chooses it, as it needs something that the caller provides."
    )
    problem: str = Field(default="", description="Why it cannot, one sentence.")
    remedy: str = Field(default="", description="The command or step that mends that.")
    engine: str = Field(default="", description="The engine's distribution.")
    engine_version: str | None = None
    formats: tuple[str, ...] = Field(default=(), description="Weight formats that it loads.")
    drafter_kinds: tuple[DrafterKind, ...] = ()
    serves: bool | None = Field(default=None, description="Whether it has a server; None: not known.")
    devices: tuple[DeviceRecord, ...] = ()
    environment: Path | None = Field(
        default=None, description="The environment that it is installed in; None: this process's own."
    )

    def __repr__(self) -> str:
        what = ", ".join(value for name, value in self._row().items() if name != "backend" and value)
        return f"<BackendInfo {self.name}: {what}>"

    __str__ = __repr__

    def _row(self) -> dict[str, str]:
        usable = "usable if named" if self.only_if_named else "usable"
        state = usable if self.usable else "not usable" if self.installed else "not installed"
        return {
            "backend": self.name,
            "state": state,
            "engine": f"{self.engine} {self.engine_version or ''}".strip(),
            "drafters": " ".join(self.drafter_kinds),
            "formats": " ".join(self.formats),
            "devices": " ".join(device.name for device in self.devices),
            "missing": f"{self.problem} {self.remedy}".strip(),
        }


class DeviceInfo(Record):
    """A device that a usable backend sees."""

    name: str = Field(description="What ``load(device=...)`` takes.")
    description: str = ""
    total_memory_bytes: int | None = None
    free_memory_bytes: int | None = None
    backends: tuple[str, ...] = Field(description="The backends that see it.")

    def __repr__(self) -> str:
        return f"<DeviceInfo {self.name}: {', '.join(value for value in [*self._row().values()][1:] if value)}>"

    __str__ = __repr__

    def _row(self) -> dict[str, str]:
        free, total = (
            "" if size is None else as_size(size) for size in (self.free_memory_bytes, self.total_memory_bytes)
        )
        return {
            "device": self.name,
            "what it is": self.description,
            "memory": f"{free} of {total} free" if free and total else total,
            "backends": " ".join(self.backends),
        }


class PairInfo(Record):
    """A target with the drafter that belongs to it."""

    target: str = Field(description="What ``load`` takes.")
    drafter: str | None = Field(description="None: n-grams, or a drafter inside the target's own file.")
    kind: DrafterKind
    format: str
    num_speculative_tokens: int = Field(description="The k that is used unless another is given.")
    backends: tuple[str, ...] = Field(description="Installed backends that run it.")

    def __repr__(self) -> str:
        return f"<PairInfo {', '.join(f'{name} {value}' for name, value in self._row().items() if value)}>"

    __str__ = __repr__

    def _row(self) -> dict[str, str]:
        return {
            "target": self.target,
            "drafter": self.drafter or "",
            "kind": self.kind,
            "format": self.format,
            "k": str(self.num_speculative_tokens),
            "runs here on": " ".join(self.backends),
        }


def backends() -> tuple[BackendInfo, ...]:
    """Every backend that is installed or known, with whether it can run here. The result shows itself as a table.

    Engines are asked in processes of their own, and answers are kept until packages, drivers or hardware change: the
    first call may take as long as importing the slowest engine.
    """
    host = surviving_host(kept=True)
    described = describe_backends(host, kept=True)
    found = [_backend(one) for one in described]
    missing = [
        BackendInfo(
            name=known.name,
            installed=False,
            usable=False,
            problem=known.why_not,
            remedy=known.install,
            formats=tuple(sorted(known.formats)),
        )
        for known in missing_backends(described, plugins_without_backend(host))
    ]
    return Listing([*sorted(found, key=lambda one: not one.usable), *missing])


def devices() -> tuple[DeviceInfo, ...]:
    """Every device that a usable backend sees on this machine. The result shows itself as a table."""
    seen: dict[str, tuple[DeviceRecord, list[str]]] = {}
    for backend in backends():
        for device in backend.devices if backend.usable else ():
            known, names = seen.setdefault(device.name, (device, []))
            if not known.description and device.description:
                seen[device.name] = device, names
            names.append(backend.name)
    return Listing(DeviceInfo(**device.model_dump(), backends=tuple(names)) for device, names in seen.values())


def pairs(target: str | None = None) -> tuple[PairInfo, ...]:
    """The known pairs, those that run here first; of one target, or of all. The result shows itself as a table.

    Raises:
        InvalidRequestError: The user's file of pairs is broken.
    """
    return Listing(map(_pair, sorted(describe_pairs(target=target), key=lambda pair: not pair.backends)))


def _backend(found: BackendDescription) -> BackendInfo:
    state = found.state
    return BackendInfo(
        name=state.record.name,
        summary=state.record.summary,
        installed=True,
        usable=state.usable,
        only_if_named=state.only_if_named,
        problem=state.problem,
        remedy=state.remedy,
        engine=state.distribution,
        engine_version=state.diagnosis.engine_version if state.diagnosis else None,
        formats=tuple(sorted(state.record.formats)),
        drafter_kinds=tuple(sorted(state.record.drafter_kinds)),
        serves=found.serves,
        devices=state.diagnosis.devices if state.diagnosis else (),
        environment=found.folder,
    )


def _pair(found: PairDescription) -> PairInfo:
    pair, ks = found.entry.pair, found.num_speculative_tokens
    return PairInfo(
        target=pair.target,
        drafter=pair.drafter,
        kind=pair.kind,
        format=pair.format,
        num_speculative_tokens=next((ks[name] for name in found.backends if name in ks), ks["*"]),
        backends=found.backends,
    )
