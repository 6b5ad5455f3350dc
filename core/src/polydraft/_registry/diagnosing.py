"""Looking at backends: what they require, known faults, and their own diagnosis."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from polydraft._containment import TookTooLong, is_callers_own, within
from polydraft._registry.backends import install_command
from polydraft._registry.engines import engine_of
from polydraft._registry.faults import fault_sentences
from polydraft._registry.states import BackendState, Backends
from polydraft._registry.versions import in_range, installed_alternative
from polydraft.contract.records import BackendRecord, Diagnosis
from polydraft.errors import PluginError, PolydraftError
from polydraft.files import system_error

if TYPE_CHECKING:
    from polydraft._registry.faults import FaultRegistry

__all__ = ["DIAGNOSIS_LIMIT", "backend_state"]

DIAGNOSIS_LIMIT = 60.0
"""Seconds for the diagnosis of one of several backends; it may import a large engine from a slow disk."""


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
    if missing := _installed_problem(record, faults):
        problem, remedy, engine = missing
        return BackendState(record=record, problem=problem, remedy=remedy, engine=engine, faults=known)
    problem, remedy = fault_sentences(*fault) if fault else ("", "")
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


def _installed_problem(record: BackendRecord, faults: FaultRegistry) -> tuple[str, str, str] | None:
    """What the record requires and is not installed, the command that installs it, and the engine that it installs."""
    for names, specifier in record.requires.items():
        found = installed_alternative(names, partial(faults.lookup, record))
        wanted = f"{' or '.join(names.split('|'))} {specifier}"
        if found is None:
            engine = engine_of(record.name)
            command = install_command(record)
            brings = engine.name if engine is not None and command != record.install_hint else ""
            return f"it needs {wanted}, which is not installed.", command, brings
        if not in_range(found[1], specifier):
            return f"it needs {wanted}; {found[0]} {found[1]} is installed.", f"pip install '{found[0]}{specifier}'", ""
    return None
