"""Finding plugins: entry points of the group ``polydraft``, each imported and checked in isolation.

A plugin that cannot be imported, breaks the contract, does not end or takes a name that is taken is *broken*: nothing
of it is used, it is listed with the reason, and the others work as if it were not there. Of two that claim a name, one
of polydraft's own distributions has it. Environment:

``POLYDRAFT_DISABLE_PLUGINS``
    Names of plugins (or of their distributions), separated by commas. They are not imported.
"""

from __future__ import annotations

import os
import threading
import warnings
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from packaging.utils import canonicalize_name

from polydraft._containment import TookTooLong, described, is_callers_own, within
from polydraft._discovery.hooks import BrokenPlugin, ask_all, check_names, import_plugin, of_kind
from polydraft._discovery.installed import Found, PluginStatus, installed_plugins

# Same floor: what is missing is looked up in its list.
from polydraft._registry.tables import core_table
from polydraft._registry.versions import in_range, installed_alternative
from polydraft.contract.backend import Backend
from polydraft.contract.records import (
    BackendRecord,
    CacheRecord,
    FaultRecord,
    LocalModelRecord,
    PairRecord,
    Record,
)
from polydraft.errors import BackendNotFoundError, BackendUnavailableError, PluginError
from polydraft.files import exhausted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from polydraft._environments.records import Environment

__all__ = ["PluginHost", "default_host"]

_VARIABLE = "POLYDRAFT_DISABLE_PLUGINS"
_IMPORT_LIMIT, _HOOKS_LIMIT = 30.0, 10.0
"""Seconds that a plugin may take to be imported, and for all its hooks together."""
R = TypeVar("R", bound=Record)
T = TypeVar("T")


class PluginHost:
    """The plugins of this process. Discovery happens once, on first use; several threads may use one host.

    Args:
        plugins: Plugins by name (modules, objects or classes without arguments), instead of the entry points.
        disabled: Names of plugins or distributions not to load, besides those of ``POLYDRAFT_DISABLE_PLUGINS``.
        environ: The environment variables to read; default ``os.environ``.
        broken: Names of plugins that are known to be broken, each with the reason; they are not imported.
        environments: Whether backends that do not run here are taken from the environments that
            ``polydraft engines install`` made: they run in a worker process.
    """

    def __init__(
        self,
        plugins: Mapping[str, Any] | None = None,
        *,
        disabled: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
        broken: Mapping[str, str] | None = None,
        environments: bool = False,
    ) -> None:
        variable = (os.environ if environ is None else environ).get(_VARIABLE, "")
        names = [*disabled, *variable.split(",")]
        self._disabled = frozenset(canonicalize_name(name.strip()) for name in names if name.strip())
        self._given = None if plugins is None else dict(plugins)
        self._broken = dict(broken or {})
        self._merges = environments
        self._lock = threading.RLock()  # re-entrant: a backend's module may ask for the host while it is imported
        self._loaded: dict[str, list[Record]] | None = None
        self._loading: set[int] = set()  # threads in which a plugin is imported or asked
        self._statuses: list[PluginStatus] = []
        self._notes: list[str] = []
        self._instances: dict[tuple[str, Path | None], Backend] = {}

    def backends(self) -> dict[str, BackendRecord]:
        """The records of all backends, by name, in alphabetical order."""
        found = self._own_backends()
        found |= {name: environment.backends[name] for name, environment in self._homes().items()}
        return dict(sorted(found.items()))

    def runs_here(self, name: str) -> bool:
        """Whether plugin and engine of a backend are installed in this process's own environment. Imports nothing."""
        record = self._own_backends().get(name)
        return record is not None and _engine_is_here(record)

    @property
    def uses_environments(self) -> bool:
        """Whether backends are also taken from the environments that ``polydraft engines install`` made."""
        return self._merges

    def home(self, name: str) -> Environment | None:
        """The environment that a backend runs in; None: this process's own, or there is no such backend."""
        return self._homes().get(name)

    def pairs(self) -> list[tuple[str, PairRecord]]:
        """The pairs of all plugins, each with its plugin's name."""
        found = [(name, pair) for name, loaded in self._discover().items() for pair in of_kind(PairRecord, loaded)]
        for environment in self._environments():
            there = [pair for _, pair in found]
            found += [(name, pair) for name, pair in environment.catalogue.pairs if pair not in there]
        return found

    def faults(self) -> list[FaultRecord]:
        """The known faults of all plugins."""
        return [
            *self._records(FaultRecord),
            *(fault for environment in self._environments() for fault in environment.catalogue.faults),
        ]

    def local_models(self) -> dict[str, LocalModelRecord]:
        """The models that plugins contain, by name."""
        found = {record.name: record for record in self._records(LocalModelRecord)}
        for environment in self._environments():
            for record in environment.catalogue.local_models:
                found.setdefault(record.name, record)
        return found

    def caches(self) -> list[CacheRecord]:
        """The folders in which plugins keep files, by name."""
        found = {record.name: record for record in self._records(CacheRecord)}
        for environment in self._environments():
            for record in environment.catalogue.caches:
                found.setdefault(record.name, record)
        return sorted(found.values(), key=lambda cache: cache.name)

    def found_names(self) -> list[str]:
        """The names of all plugins that would be imported; none is."""
        return [status.name for status, _ in self._find()[0] if status.state != "broken"]

    def statuses(self) -> list[PluginStatus]:
        """Every plugin that was found, loaded or not, by name."""
        self._discover()
        homes = self._homes()
        elsewhere = [
            PluginStatus(
                name=found.plugin,
                distribution=found.distribution,
                version=found.version,
                backends=(name,),
                environment=home.name,
            )
            for name, home in homes.items()
            for found in [home.backend(name)]
        ]
        return sorted(
            [*self._statuses, *elsewhere],
            key=lambda status: (status.name, status.distribution or "", status.environment),
        )

    def notes(self) -> list[str]:
        """Sentences about the plugin settings themselves, such as a disabled name that no plugin has."""
        self._discover()
        return list(self._notes)

    @property
    def crosses(self) -> bool:
        """Whether another process of this interpreter finds the same plugins: not those that were given as objects."""
        return self._given is None

    def plugin_of(self, name: str) -> str | None:
        """The name of the plugin that provides a backend; None if there is no such backend."""
        if (home := self.home(name)) is not None:
            return home.backend(name).plugin
        loaded = self._discover()
        owners = (
            owner for owner, mine in loaded.items() if any(one.name == name for one in of_kind(BackendRecord, mine))
        )
        return next(owners, None)

    def backend(self, name: str) -> Backend:
        """The backend of that name; its module is imported now, its engine not yet.

        Raises:
            BackendNotFoundError: No such backend is installed, or its plugin is disabled.
            PluginError: Its plugin is broken, or its class cannot be imported or is not a ``Backend``.
        """
        if (environment := self.home(name)) is not None:
            return self._worker(name, environment)
        record = self._own_backends().get(name)
        if record is None:
            raise self._not_found(name)
        if (name, None) not in self._instances:
            made = _instantiate(record)  # without the lock: an import that hangs must not keep others waiting
            with self._lock:
                self._instances.setdefault((name, None), made)
        return self._instances[name, None]

    def _worker(self, name: str, environment: Environment) -> Backend:
        """A backend of an environment, which this process uses from now on."""
        from polydraft._environments.store import hold
        from polydraft._workers.backend import WorkerBackend

        environment = hold(environment)
        with self._lock:
            if (name, environment.folder) not in self._instances:
                found = environment.backend(name)
                # ``update`` keeps the source, which may be a clone that is not this one.
                verb = "update" if environment.packages else "install"
                self._instances[name, environment.folder] = WorkerBackend(
                    found.record,
                    environment.python,
                    reason=f"The engine {environment.name} is installed in an environment of its own.",
                    capabilities=found.capabilities,
                    options=found.options_schema,
                    mend=f"polydraft engines {verb} {environment.name} --again",
                )
            return self._instances[name, environment.folder]

    def _own_backends(self) -> dict[str, BackendRecord]:
        return {record.name: record for record in self._records(BackendRecord)}

    def _homes(self) -> dict[str, Environment]:
        """Backend -> the environment that it runs in, for those that do not run in this process's own."""
        if not self._merges:
            return {}
        from polydraft._environments.store import environments

        own = self._own_backends()
        found: dict[str, Environment] = {}
        for environment in environments().values():
            names = {canonicalize_name(environment.name)}
            names |= {canonicalize_name(one.distribution or "") for one in environment.catalogue.backends}
            if not names & self._disabled:
                for name in environment.backends:
                    if name not in own or not _engine_is_here(own[name]):
                        found.setdefault(name, environment)
        return found

    def _environments(self) -> list[Environment]:
        """The environments that backends run in, once each."""
        return list({environment.name: environment for environment in self._homes().values()}.values())

    def _records(self, kind: type[R]) -> list[R]:
        return [record for loaded in self._discover().values() for record in of_kind(kind, loaded)]

    def _not_found(self, name: str) -> PluginError | BackendNotFoundError | BackendUnavailableError:
        from polydraft._environments.store import broken_environment
        from polydraft._registry.backends import not_installed_hint
        from polydraft._registry.engines import engine_of

        for status in self.statuses():
            if name != status.name and name not in status.backends:
                continue
            if status.state == "broken":
                return PluginError(
                    f"The plugin {status.name!r}, which provides the backend {name!r}, is broken: {status.reason}",
                    f"Update or uninstall {status.distribution or status.name}; `polydraft doctor` lists all plugins.",
                )
            if status.state == "disabled":
                return BackendNotFoundError(
                    f"The backend {name!r} is not available: its plugin is disabled.",
                    f"Take {status.name!r} out of {_VARIABLE} (or of the argument `disabled`).",
                )
        broken = [
            f"{status.name} ({status.reason.rstrip('.')})" for status in self.statuses() if status.state == "broken"
        ]
        engine = engine_of(name)
        if engine is not None and self._merges and (environment := broken_environment(engine.name)):
            return BackendUnavailableError(
                f"The environment of {engine.name} cannot be used. {environment.reason}", environment.hint
            )
        hint = not_installed_hint(name, installed=list(self.backends()))
        return BackendNotFoundError(
            f"There is no backend {name!r}." if engine is None else f"The backend {name} is not installed.",
            f"{hint} Broken plugins: {'; '.join(broken)}." if broken else hint,
            engine=engine.name if engine is not None else "",
        )

    def _discover(self) -> dict[str, list[Record]]:
        if threading.get_ident() in self._loading:  # the lock is held for the plugin that asks
            raise PluginError("A plugin asks for the plugins while they are being looked for.", "Report it.")
        with self._lock:
            if self._loaded is None:
                self._statuses = []  # of an attempt for which memory or file handles ran out
                self._loaded = self._load_all()
            return self._loaded

    def _load_all(self) -> dict[str, list[Record]]:
        loaded: dict[str, list[Record]] = {}
        homes: dict[str, str] = {}  # plugin -> distribution
        unused = set(self._disabled)
        found, unreadable = self._find()
        for status, load in found:
            # A plugin may be disabled by its name or by its distribution's.
            names = {canonicalize_name(status.name), canonicalize_name(status.distribution or status.name)}
            unused -= names
            outcome: dict[str, Any]
            try:
                if names & self._disabled:
                    outcome = {"state": "disabled", "reason": f"Disabled by {_VARIABLE} or by the caller."}
                elif status.state == "broken":
                    outcome = {}  # found out before it could be loaded
                elif status.name in self._broken:
                    raise BrokenPlugin(self._broken[status.name])
                elif status.name in loaded:
                    owner = homes[status.name] or "the caller"
                    raise BrokenPlugin(f"Another plugin is already named {status.name!r}, that of {owner}.")
                else:
                    homes[status.name] = status.distribution or ""
                    mine = self._load(status.name, load)
                    check_names(mine, loaded)
                    # After all checks: nothing of a broken plugin is ever visible.
                    loaded[status.name] = mine
                    outcome = {"backends": tuple(record.name for record in of_kind(BackendRecord, mine))}
            except BrokenPlugin as reason:
                at_fault = (reason.backend,) if reason.backend else ()
                outcome = {"state": "broken", "reason": str(reason), "backends": at_fault}
            self._statuses.append(status.model_copy(update=outcome))
        self._notes = [f"{_VARIABLE} names {name!r}, but no plugin has that name." for name in sorted(unused)]
        for name in sorted(unused - self._known_elsewhere()) if self._given is None and unused else ():
            warnings.warn(f"{_VARIABLE} names {name!r}, but no plugin has that name.", stacklevel=2)
        self._notes += unreadable
        return loaded

    def _known_elsewhere(self) -> set[str]:
        """Names that may be disabled though they are not installed here: polydraft's own, and those of environments."""
        from polydraft._environments.store import environments

        own = {table["distribution"] for table in core_table("plugin")}
        known = {*own, *(name.removeprefix("polydraft-") for name in own)}
        for environment in environments().values() if self._merges else ():
            known |= {environment.name, *(one.distribution or one.plugin for one in environment.catalogue.backends)}
        return {canonicalize_name(name) for name in known}

    def _find(self) -> tuple[list[Found], list[str]]:
        """The plugins in the order in which they may claim names, and notes on packages that cannot be read.

        polydraft's own come first, then by plugin name and distribution.
        """
        if self._given is not None:
            return [(PluginStatus(name=name), partial(self._given.__getitem__, name)) for name in self._given], []
        found, unreadable = installed_plugins()
        own = {canonicalize_name(table["distribution"]) for table in core_table("plugin")}

        # Entry points come in the order of the file system, and the first plugin keeps a name that two claim.
        def rank(plugin: Found) -> tuple[bool, str, str]:
            home = plugin[0].distribution or ""
            return canonicalize_name(home) not in own, plugin[0].name, home

        return sorted(found, key=rank), unreadable

    def _load(self, name: str, load: Callable[[], Any]) -> list[Record]:
        """Import one plugin and ask it for its records, each within a time limit; the working directory is kept."""
        folder = _working_directory()
        try:
            plugin = self._within(_IMPORT_LIMIT, "Its import", partial(import_plugin, name, load))
            return self._within(_HOOKS_LIMIT, "Its hooks", partial(ask_all, name, plugin))
        finally:
            if folder is not None and _working_directory() != folder:
                os.chdir(folder)

    def _within(self, seconds: float, what: str, work: Callable[[], T]) -> T:
        def run() -> T:
            self._loading.add(threading.get_ident())
            try:
                return work()
            finally:
                self._loading.discard(threading.get_ident())

        try:
            return within(seconds, run)
        except TookTooLong:
            raise BrokenPlugin(f"{what} did not end within {seconds:g} seconds.") from None


def _working_directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - a string is enough, and this runs at every start
    except OSError:  # it was removed
        return None


def _engine_is_here(record: BackendRecord) -> bool:
    """Whether this process's environment has what a backend requires; nothing is imported."""
    return all(
        (found := installed_alternative(names)) is not None and in_range(found[1], specifier)
        for names, specifier in record.requires.items()
    )


def _instantiate(record: BackendRecord) -> Backend:
    module, _, attribute = record.factory.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
        backend = factory()
    except BaseException as error:
        if is_callers_own(error):
            raise
        if refused := exhausted(error, f"The backend {record.name!r} cannot be made"):
            raise refused from error
        raise PluginError(
            f"The backend {record.name!r} cannot be made from {record.factory}: {described(error)}.",
            f"Install it again: {record.install_hint}",
        ) from error
    if not isinstance(backend, Backend):
        raise PluginError(
            f"{record.factory} of the backend {record.name!r} is not a Backend.", "Report it to the plugin's author."
        )
    return backend


@cache
def default_host() -> PluginHost:
    """The host of the plugins that are installed here, and in engines' environments; made on first use."""
    return PluginHost(environments=True)
