"""``polydraft.engines()``: every known engine on this machine, without importing one and without the network."""

from __future__ import annotations

from typing import Any

from polydraft._environments.interpreters import interpreter_for
from polydraft._environments.machine import lacking, variant_for
from polydraft._environments.plan import engine_named, of_other_version, plan_for
from polydraft._environments.records import EngineState, Environment
from polydraft._environments.store import Broken, all_environments, left_over
from polydraft._environments.tools import uv_here
from polydraft._plugins import PluginHost, default_host
from polydraft._registry.engines import KnownEngine, known_engines
from polydraft._registry.faults import distributions
from polydraft._registry.versions import installed_version
from polydraft.errors import PolydraftError

__all__ = ["engines"]

_HALF_MADE = "An installation of it did not end, or is going on; installing it again makes it anew."


def engines() -> tuple[EngineState, ...]:
    """Every engine that polydraft knows or finds, installed or not, with what installing it takes on this machine.

    Nothing is imported, installed or downloaded. ``polydraft engines install NAME`` installs one into an environment of
    its own, and ``polydraft.load(..., backend=...)`` takes the names in ``backends``.
    """
    host = default_host()
    there = all_environments()
    names = dict.fromkeys([*known_engines(), *there, *_other_plugins(host)])
    return tuple(_state(name, host, there.get(name)) for name in names)


def _other_plugins(host: PluginHost) -> list[str]:
    return [status.name for status in host.statuses() if status.state == "loaded" and status.backends]


def _state(name: str, host: PluginHost, found: Environment | Broken | None) -> EngineState:
    state = _elsewhere(name, found)
    here = [
        backend
        for status in host.statuses()
        if status.name == name and status.state == "loaded" and not status.environment
        for backend in status.backends
    ]
    if not here or not all(map(host.runs_here, here)):
        return state
    records = [host.backends()[backend] for backend in here]
    wanted = dict.fromkeys(["polydraft", *(each for record in records for each in distributions(record))])
    versions = {each: version for each in wanted if (version := installed_version(each))}
    own: dict[str, Any] = {"state": "installed here", "backends": tuple(here), "versions": versions}
    if found is None:  # nothing to install
        own |= {"accelerator": None, "disk_bytes": None, "minutes": None, "why_not": "", "command": "", "reason": ""}
    return state.model_copy(update=own)


def _elsewhere(name: str, found: Environment | Broken | None) -> EngineState:
    """The state of an engine's environment, whatever is installed in this process's own."""
    if isinstance(found, Environment):
        return _installed(found)
    known = known_engines().get(name)
    state = _not_installed(name, known) if known is not None else EngineState(name=name, state="not installed")
    if isinstance(found, Broken):
        return state.model_copy(update={"state": "broken", "reason": found.reason, "command": found.command})
    return state.model_copy(update={"reason": _HALF_MADE}) if left_over(name) else state


def _installed(found: Environment) -> EngineState:
    wanted = dict.fromkeys(
        ["polydraft", *(each for record in found.backends.values() for each in distributions(record))]
    )
    try:
        engine = engine_named(found.name, found.packages)
        plan = plan_for(
            engine.name,
            accelerator=found.accelerator,
            source=found.source,
            python=found.python_wanted or None,
            packages=found.packages,
            check_space=False,
        )
        update = plan.differs_from(found)
    except PolydraftError:  # it could not be made like that now, which is no reason against one that is there
        update = of_other_version(found)
    return EngineState(
        name=found.name,
        state="installed",
        backends=tuple(found.backends),
        versions={each: found.versions[each] for each in wanted if each in found.versions},
        folder=found.folder,
        python=found.python,
        accelerator=found.accelerator,
        disk_bytes=found.bytes,
        update=update,
        command=f"polydraft engines update {found.name}" if update else "",
    )


def _not_installed(name: str, engine: KnownEngine) -> EngineState:
    state = EngineState(name=name, state="not installed", backends=engine.backends)
    try:
        variant = variant_for(engine)
    except PolydraftError as error:
        return state.model_copy(update={"why_not": str(error)})
    why_not = ""
    try:
        if problem := lacking(engine, variant):
            raise problem
        interpreter_for(engine, None, uv_here())
    except PolydraftError as error:
        why_not = str(error)
    return state.model_copy(
        update={
            "accelerator": variant.accelerator,
            "disk_bytes": variant.disk_mb * 10**6,
            "minutes": variant.minutes,
            "why_not": why_not,
            "command": "" if why_not else f"polydraft engines install {name}",
        }
    )
