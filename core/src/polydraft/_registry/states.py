"""The state of a backend on this machine: its requirements, its known faults and its own diagnosis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from polydraft._containment import TookTooLong, is_callers_own, within
from polydraft._registry.faults import fault_sentences
from polydraft._registry.versions import in_range, installed_alternative
from polydraft.contract.records import BackendRecord, Diagnosis, FaultRecord, Record
from polydraft.errors import BackendUnavailableError, DeviceError, PluginError, PolydraftError
from polydraft.files import system_error

if TYPE_CHECKING:
    from polydraft._registry.faults import FaultRegistry
    from polydraft.contract.backend import Backend

__all__ = ["DIAGNOSIS_LIMIT", "BackendState", "backend_state"]

DIAGNOSIS_LIMIT = 60.0
"""Seconds for the diagnosis of one of several backends; it may import a large engine from a slow disk."""


class Backends(Protocol):
    """Makes backends by name: the host of the plugins, or one that puts some of them into workers."""

    def backend(self, name: str) -> Backend:
        """The backend of that name."""


class BackendState(Record):
    """A backend on this machine."""

    record: BackendRecord
    diagnosis: Diagnosis | None = None
    """The backend's own report; None if it was not asked, because something else is in the way."""
    problem: str = ""
    """Why it cannot run here, one sentence; empty if it can."""
    remedy: str = ""
    """The exact command or step that fixes it."""
    faults: tuple[tuple[FaultRecord, str], ...] = ()
    """Known faults of the installed versions, each with the version."""

    @property
    def usable(self) -> bool:
        """Whether the backend can run here."""
        return not self.problem

    def check(self) -> None:
        """Raise if the backend is not usable.

        Raises:
            BackendUnavailableError: It is not.
        """
        if self.problem:
            raise BackendUnavailableError(
                f"The backend {self.record.name} cannot run here: {self.problem}", self.remedy
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
        # `cuda` is any of cuda:0, cuda:1, ...; `cpu:0` is cpu.
        if kind in {name.partition(":")[0] for name in devices} and (not index or (index == "0" and kind in devices)):
            return
        raise DeviceError(
            f"The backend {self.record.name} sees no device {device!r} here.", f"It sees: {', '.join(devices)}."
        )


def backend_state(
    host: Backends, record: BackendRecord, faults: FaultRegistry, *, seconds: float | None = None
) -> BackendState:
    """Look at one backend. Never raises: whatever goes wrong is the backend's ``problem``.

    In this order: what the record requires must be installed, no known fault may forbid the engine as a whole, and the
    backend's own diagnosis, which may import the engine, must find it usable.

    Args:
        host: Makes the backend.
        record: The backend.
        faults: Known faults of engines.
        seconds: How long the diagnosis may take, for callers that ask several backends: one that hangs must not keep
            them from the others. None: as long as it takes.
    """
    known = tuple(faults.faults_of(record))
    fault = faults.refusal(record, {"import"}, model_types=())  # one that holds for every model
    problem, remedy = _installed_problem(record, faults) or (fault_sentences(*fault) if fault else ("", ""))
    if problem:
        return BackendState(record=record, problem=problem, remedy=remedy, faults=known)

    def diagnose() -> Diagnosis:
        made = host.backend(record.name).diagnose()
        if not isinstance(made, Diagnosis):
            raise TypeError(f"diagnose() returned a {type(made).__name__}")
        return Diagnosis.model_validate(vars(made))  # again: it may have been made without validation

    try:
        diagnosis = diagnose() if seconds is None else within(seconds, diagnose)
    except TookTooLong:
        problem, remedy = f"Its diagnosis did not end within {seconds:g} seconds.", "Report it to the plugin's author."
        return BackendState(record=record, problem=problem, remedy=remedy, faults=known)
    except PluginError as error:
        return BackendState(record=record, problem=error.message, remedy=error.hint, faults=known)
    except BaseException as error:  # a broken plugin must not break doctor or backend="auto"
        if is_callers_own(error):
            raise
        told = error if isinstance(error, PolydraftError) else system_error(error)
        hint = told.hint if told is not None else "Report it to the plugin's author."
        return BackendState(
            record=record, problem=f"Its diagnosis fails: {type(error).__name__}: {error}.", remedy=hint, faults=known
        )
    if not diagnosis.usable:
        problem, remedy = diagnosis.reason or "no reason was given.", diagnosis.remedy or record.install_hint
    return BackendState(record=record, diagnosis=diagnosis, problem=problem, remedy=remedy, faults=known)


def _installed_problem(record: BackendRecord, faults: FaultRegistry) -> tuple[str, str] | None:
    """What the record requires and this environment lacks, with the command that installs it."""
    for names, specifier in record.requires.items():
        found = installed_alternative(names, faults.lookup)
        wanted = f"{' or '.join(names.split('|'))} {specifier}"
        if found is None:
            return f"it needs {wanted}, which is not installed.", record.install_hint
        if not in_range(found[1], specifier):
            return f"it needs {wanted}; {found[0]} {found[1]} is installed.", f"pip install '{found[0]}{specifier}'"
    return None
