"""Whether a backend can run here: its requirements, its known faults and its own diagnosis, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract.records import BackendRecord, Diagnosis, FaultRecord, Record
from polydraft.errors import BackendUnavailableError, PluginError, PolydraftError
from polydraft.registry.versions import in_range, installed_alternative

if TYPE_CHECKING:
    from polydraft.plugins import PluginHost
    from polydraft.registry.faults import FaultRegistry

__all__ = ["BackendState", "backend_state"]


class BackendState(Record):
    """A backend on this machine."""

    record: BackendRecord
    diagnosis: Diagnosis | None = None
    """What the backend says of itself; None if its class could not be made."""
    problem: str = ""
    """Why it cannot run here, one sentence; empty if it can."""
    remedy: str = ""
    """The exact command or step that mends it."""
    faults: tuple[tuple[FaultRecord, str], ...] = ()
    """Known faults of the installed versions, each with the version."""

    @property
    def usable(self) -> bool:
        """Whether nothing is in the way."""
        return not self.problem

    def check(self) -> None:
        """Do nothing if the backend is usable.

        Raises:
            BackendUnavailableError: It is not.
        """
        if self.problem:
            raise BackendUnavailableError(
                f"The backend {self.record.name} cannot run here: {self.problem}", self.remedy
            )


def backend_state(host: PluginHost, record: BackendRecord, faults: FaultRegistry) -> BackendState:
    """Look at one backend. Never raises: whatever goes wrong is the backend's ``problem``.

    The backend's own diagnosis counts first, as it knows best; then the record's requirements; then known faults that
    forbid the engine as a whole.
    """
    known = tuple(faults.faults_of(record))
    try:
        backend = host.backend(record.name)
    except PluginError as error:
        return BackendState(record=record, problem=error.message, remedy=error.hint, faults=known)
    try:
        diagnosis = backend.diagnose()
        if not isinstance(diagnosis, Diagnosis):
            raise TypeError(f"diagnose() gave a {type(diagnosis).__name__}")
    except Exception as error:  # a plugin's fault must not take doctor or backend="auto" down
        hint = error.hint if isinstance(error, PolydraftError) else "Tell the plugin's author."
        return BackendState(
            record=record, problem=f"Its diagnosis fails: {type(error).__name__}: {error}.", remedy=hint, faults=known
        )
    problem, remedy = _problem(record, diagnosis, faults, known)
    return BackendState(record=record, diagnosis=diagnosis, problem=problem, remedy=remedy, faults=known)


def _problem(
    record: BackendRecord,
    diagnosis: Diagnosis,
    faults: FaultRegistry,
    known: tuple[tuple[FaultRecord, str], ...],
) -> tuple[str, str]:
    if not diagnosis.usable:
        return diagnosis.reason or "it says no reason.", diagnosis.remedy or record.install_hint
    for names, specifier in record.requires.items():
        found = installed_alternative(names, faults.lookup)
        wanted = f"{' or '.join(names.split('|'))} {specifier}"
        if found is None:
            return f"it needs {wanted}, which is not installed.", record.install_hint
        if not in_range(found[1], specifier):
            return f"it needs {wanted}; {found[0]} {found[1]} is installed.", f"pip install '{found[0]}{specifier}'"
    for fault, version in known:
        if fault.severity == "refuse" and fault.affects in {"import", "all"} and not fault.architectures:
            link = f" See {fault.link}." if fault.link else ""
            return f"{fault.distribution} {version} has a known fault: {fault.summary}", f"{fault.remedy}{link}"
    return "", ""
