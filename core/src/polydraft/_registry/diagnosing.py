"""Looking at backends: what they require, known faults, and their own diagnosis."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from polydraft._containment import TookTooLong, is_callers_own, within
from polydraft._probes.interpreter import own_python
from polydraft._probes.kept import asked
from polydraft._probes.records import Answer
from polydraft._registry.backends import install_command
from polydraft._registry.engines import engine_of
from polydraft._registry.faults import fault_sentences
from polydraft._registry.states import Backends, BackendState
from polydraft._registry.versions import in_range, installed_alternative
from polydraft.contract.backend import Backend
from polydraft.contract.records import BackendRecord, Diagnosis
from polydraft.errors import PluginError, PolydraftError
from polydraft.files import system_error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft._plugins import PluginHost
    from polydraft._registry.faults import FaultRegistry

__all__ = ["DIAGNOSIS_LIMIT", "backend_state", "diagnose_all", "serves"]

DIAGNOSIS_LIMIT = 60.0
"""Seconds for the diagnosis of one of several backends; it may import a large engine from a slow disk."""


_ANOTHER = "Choose another one: `polydraft backends` lists them."
"""The remedy where a backend names none: its engine is installed, so that installing it again would change nothing."""


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
    before = _before_import(record, faults)
    if before.problem:
        return before
    known, problem, remedy = before.faults, "", ""

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
        said = (error.message if isinstance(error, PolydraftError) else str(error)).rstrip(".")
        return BackendState(
            record=record, problem=f"Its diagnosis fails: {type(error).__name__}: {said}.", remedy=hint, faults=known
        )
    if not diagnosis.usable:
        problem, remedy = diagnosis.reason or "no reason was given.", diagnosis.remedy or _ANOTHER
    return BackendState(record=record, diagnosis=diagnosis, problem=problem, remedy=remedy, faults=known)


def diagnose_all(
    host: PluginHost,
    records: Iterable[BackendRecord],
    faults: FaultRegistry,
    *,
    seconds: float,
    kept: bool,
    here: bool = True,
    makes: Backends | None = None,
) -> dict[str, Answer]:
    """Look at several backends. Of two plugins, never are both engines imported into this process.

    Where this process may have to import more than one plugin's engine, each backend is asked in a process of its own,
    at the same time. The others are looked at here: backends that lack what they require, and those of a host that
    was given its plugins as objects, which cannot cross.

    Args:
        host: The plugins.
        records: The backends.
        faults: Known faults of engines.
        seconds: How long each diagnosis may take.
        kept: A diagnosis that was kept may be taken. Otherwise all are asked anew.
        here: With ``kept``: the engine of a single plugin may be imported into this process.
        makes: Makes the backends that are looked at here, some of them in workers perhaps; None: the host.

    Returns:
        By name, an answer with the state, and with the capabilities of what was asked in another process.
    """
    states = {record.name: _before_import(record, faults) for record in records}
    open_ones = [state.record for state in states.values() if not state.problem]
    python = own_python() if host.crosses else None
    answers = {name: Answer(backend=name, state=state) for name, state in states.items()}
    homes = {record.name: host.home(record.name) for record in open_ones}
    plugins = {(home and home.name, host.plugin_of(name)) for name, home in homes.items()}
    if python is None or (kept and here and len(plugins) <= 1 and not any(homes.values())):
        for record in open_ones:
            state = backend_state(makes or host, record, faults, seconds=seconds)
            answers[record.name] = Answer(backend=record.name, state=state, serves=serves(makes or host, record.name))
        return answers
    for answer in asked(python, open_ones, homes, seconds=seconds, anew=not kept):
        before = states[answer.backend]
        state = answer.state_of(before.record).model_copy(update={"faults": before.faults})
        answers[answer.backend] = answer.model_copy(update={"state": state})
    return answers


def serves(host: Backends, name: str) -> bool | None:
    """Whether a backend has a server; None if its class cannot be imported."""
    with suppress(Exception):  # told by its state
        return type(host.backend(name)).server_command is not Backend.server_command
    return None


def _before_import(record: BackendRecord, faults: FaultRegistry) -> BackendState:
    """The state as far as it is known without the backend: its requirements and known faults."""
    known = tuple(faults.faults_of(record))
    if missing := _installed_problem(record, faults):
        problem, remedy, engine = missing
        return BackendState(record=record, problem=problem, remedy=remedy, engine=engine, faults=known)
    fault = faults.refusal(record, {"import"}, model_types=())  # one that holds for every model
    problem, remedy = fault_sentences(*fault) if fault else ("", "")
    return BackendState(record=record, problem=problem, remedy=remedy, faults=known)


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
