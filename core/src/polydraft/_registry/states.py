"""The record of a backend's state on this machine: its requirements, its known faults and its own diagnosis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from polydraft._registry.versions import installed_alternative
from polydraft.contract.records import BackendRecord, Diagnosis, FaultRecord, Pasteable, Record
from polydraft.errors import BackendUnavailableError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft.contract.backend import Backend

__all__ = ["BackendState", "Backends", "check_device_of_any"]


class Backends(Protocol):
    """Makes backends by name: the host of the plugins, or one that puts some of them into workers."""

    def backend(self, name: str) -> Backend:
        """The backend of that name."""


_KINDS_OF_GPU = {"cuda", "metal", "mps"}


def check_device_of_any(states: Iterable[BackendState], device: str) -> None:
    """Check a device against those that the usable backends report; do nothing if one of them reports none.

    Raises:
        DeviceError: None of them sees it.
    """
    seen: dict[str, None] = {}
    for state in states:
        if state.diagnosis and state.usable and (state.diagnosis.devices or not state.only_if_named):
            try:
                state.check_device(device)
            except DeviceError:
                seen |= dict.fromkeys(found.name for found in state.diagnosis.devices)
            else:
                return
    if seen:
        raise DeviceError(
            f"There is no device {device!r} here that this model could run on.",
            f"There is: {', '.join(seen)}. `polydraft doctor` shows more about each backend.",
        )


class BackendState(Record):
    """A backend on this machine."""

    record: BackendRecord
    diagnosis: Diagnosis | None = None
    """The backend's own report; None if it was not asked, because something else is in the way."""
    problem: str = ""
    """Why it cannot run here, one sentence; empty if it can."""
    remedy: Pasteable = ""
    """The exact command or step that fixes it."""
    engine: str = ""
    """What ``polydraft engines install`` takes to mend it; empty: it does not."""
    faults: tuple[tuple[FaultRecord, str], ...] = ()
    """Known faults of the installed versions, each with the version."""

    @property
    def usable(self) -> bool:
        """Whether the backend can run here."""
        return not self.problem

    @property
    def only_if_named(self) -> bool:
        """Whether ``backend="auto"`` never chooses it, as it needs something that the caller provides."""
        return self.usable and self.diagnosis is not None and self.diagnosis.rank == 0

    @property
    def distribution(self) -> str:
        """The engine's distribution: the installed one, where the record names several."""
        engine = self.record.engine
        names = next((key for key in self.record.requires if engine in key.split("|")), engine)
        found = installed_alternative(names)
        return found[0] if found else engine

    def check(self) -> None:
        """Raise if the backend is not usable.

        Raises:
            BackendUnavailableError: It is not.
        """
        if self.problem:
            raise BackendUnavailableError(
                f"The backend {self.record.name} cannot run here: {self.problem}", self.remedy, engine=self.engine
            )

    def check_device(self, device: str) -> None:
        """Check a device against those that the backend reports; do nothing if it reports none.

        Raises:
            DeviceError: It is not among them.
        """
        devices = [found.name for found in self.diagnosis.devices] if self.diagnosis else []
        kind, _, index = device.partition(":")
        if device == "auto" or not devices or device in devices:
            return
        # Of which kind a backend's `gpu` is, the backend says when it loads.
        if kind in _KINDS_OF_GPU and "gpu" in {name.partition(":")[0] for name in devices}:
            return
        # `cuda` is any of cuda:0, cuda:1, ...; `cpu:0` is cpu.
        if kind in {name.partition(":")[0] for name in devices} and (not index or (index == "0" and kind in devices)):
            return
        raise DeviceError(
            f"The backend {self.record.name} sees no device {device!r} here.", f"It sees: {', '.join(devices)}."
        )
