"""Whether an engine runs in this process or in a worker: ``load(..., isolation=...)``."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from pydantic import Field

from polydraft._registry.backends import known_backends
from polydraft._registry.tables import core_table
from polydraft._workers.backend import WorkerBackend
from polydraft.contract.records import Record
from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft._plugins import PluginHost
    from polydraft.contract.backend import Backend

__all__ = ["Clash", "Isolator", "clash_with", "start_worker"]


class Clash(Record):
    """Native libraries of two modules that end a process which loads both."""

    modules: tuple[str, str]
    build: str = Field(
        default="", description="Only for builds whose folder of the first module holds a file of this pattern."
    )
    reason: str = Field(description="What happens, as part of a sentence.")
    source: str = Field(description="Where that is known from.")


class Isolator:
    """The backends of a host, each in this process or in a worker.

    Args:
        host: The plugins.
        asked: ``auto``, ``process`` or ``none``.
    """

    def __init__(self, host: PluginHost, asked: str) -> None:
        self._host = host
        self._asked = asked
        self._found: dict[str, tuple[Backend, str]] = {}

    def backend(self, name: str) -> Backend:
        """The backend of that name, decided upon once.

        Raises:
            UnsupportedError: ``isolation="none"`` was asked for, and its engine is in another environment.
            PolydraftError: As ``PluginHost.backend``.
        """
        return self._decided(name)[0]

    def reason(self, name: str) -> str:
        """Why the engine of that backend runs where it does, one sentence."""
        return self._decided(name)[1]

    def _decided(self, name: str) -> tuple[Backend, str]:
        if name not in self._found:
            self._found[name] = self._decide(name)
        return self._found[name]

    def _decide(self, name: str) -> tuple[Backend, str]:
        backend = self._host.backend(name)
        if isinstance(backend, WorkerBackend):
            if self._asked == "none":
                raise UnsupportedError(
                    f"The engine of {name} is installed in an environment of its own: it cannot run in this process.",
                    f"Use `isolation='auto'`, or install it here: {self._host.backends()[name].install_hint}",
                )
            return backend, backend.reason
        if self._asked == "none":
            return backend, "`isolation='none'` was given."
        if self._asked == "process":
            reason = "`isolation='process'` was given."
        elif (clash := clash_with(name, sys.modules)) is None:
            return backend, "The engine is installed here, and nothing that is loaded clashes with it."
        else:
            reason = f"{clash[1]} is loaded here, and {clash[0].reason}."
        # One for all loads: a worker that has answered questions for a load that was refused serves the next one.
        workers = _workers.setdefault(self._host, {})
        if name not in workers:
            # The plugin's own classes are light: they import their engine when they are asked something.
            workers[name] = WorkerBackend(
                self._host.backends()[name],
                options=backend.options,
                exclusions=backend.conformance_exclusions(),
            )
        return workers[name], reason


def start_worker(host: PluginHost, name: str, asked: str) -> None:
    """Start the worker of a backend that will need one: that takes as long as the checks before it is asked anything.

    Args:
        host: The plugins.
        name: The backend.
        asked: As of ``Isolator``.

    Raises:
        PolydraftError: As ``Isolator.backend``.
    """
    backend = Isolator(host, asked).backend(name)
    if isinstance(backend, WorkerBackend):
        backend.start()


_workers: WeakKeyDictionary[PluginHost, dict[str, WorkerBackend]] = WeakKeyDictionary()
"""The backends of each host that have been put into workers."""


@cache
def _clashes() -> tuple[Clash, ...]:
    return tuple(Clash.model_validate(table) for table in core_table("clash", file="backends"))


def clash_with(backend: str, loaded: Iterable[str]) -> tuple[Clash, str] | None:
    """The rule by which a backend's engine may not be loaded into this process, and the module that is in the way.

    Args:
        backend: The backend's name.
        loaded: Names of the modules that this process has imported.
    """
    present = set(loaded)
    for known in known_backends():
        if known.name != backend:
            continue
        for clash in _clashes():
            for own, other in (clash.modules, clash.modules[::-1]):
                if own in known.modules and other in present and _is_build(clash):
                    return clash, other
    return None


def _is_build(clash: Clash) -> bool:
    """Whether the installed build is one that a rule is about. Imports nothing."""
    if not clash.build:
        return True
    try:
        spec = find_spec(clash.modules[0])
    except (ImportError, ValueError):  # ValueError: a module without a spec
        return False
    folders = spec.submodule_search_locations if spec is not None else None
    return any(any(Path(folder).glob(clash.build)) for folder in folders or ())
