"""Finding plugins: entry points of the group ``polydraft``, each imported and checked in isolation.

A plugin that cannot be imported, breaks the contract, does not end or takes a name that is taken is *broken*: nothing
of it is used, it is listed with the reason, and the others work as if it were not there. Of two that claim a name, one
of polydraft's own distributions has it. Environment:

``POLYDRAFT_DISABLE_PLUGINS``
    Names of plugins (or of their distributions), separated by commas. They are not imported.
"""

from __future__ import annotations

import inspect
import os
import threading
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy
from packaging.utils import canonicalize_name
from pydantic import ValidationError

from polydraft._containment import TookTooLong, is_callers_own, within

# Same floor: plugins' records are checked like the registry's own, and what is missing is looked up in its list.
from polydraft._registry.tables import check_pair_record, core_table
from polydraft.contract.backend import Backend
from polydraft.contract.hookspecs import ENTRY_POINT_GROUP, PROJECT_NAME, PolydraftSpec
from polydraft.contract.records import (
    CONTRACT_VERSION,
    BackendRecord,
    CacheRecord,
    FaultRecord,
    LocalModelRecord,
    PairRecord,
    Record,
)
from polydraft.errors import BackendNotFoundError, PluginError, PolydraftError
from polydraft.files import exhausted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["PluginHost", "PluginStatus", "default_host", "plugin_errors"]

_VARIABLE = "POLYDRAFT_DISABLE_PLUGINS"
_IMPORT_LIMIT, _HOOKS_LIMIT = 30.0, 10.0
"""Seconds that a plugin may take to be imported, and for all its hooks together."""
_MOST_RECORDS = 10_000
"""Records that one hook may give."""

_HOOKS: dict[str, type[Record]] = {
    "polydraft_backends": BackendRecord,
    "polydraft_pairs": PairRecord,
    "polydraft_faults": FaultRecord,
    "polydraft_local_models": LocalModelRecord,
    "polydraft_caches": CacheRecord,
}
R = TypeVar("R", bound=Record)
T = TypeVar("T")


class PluginStatus(Record):
    """One plugin that was found, and whether it is used."""

    name: str
    distribution: str | None = None
    version: str | None = None
    state: Literal["loaded", "disabled", "broken"] = "loaded"
    reason: str = ""
    backends: tuple[str, ...] = ()


_Found = tuple[PluginStatus, "Callable[[], Any]"]
"""A plugin before it is imported, with what imports it."""


class _BrokenPlugin(Exception):  # noqa: N818 - caught in this module, never seen outside
    """Why a plugin is not used, one sentence; ``backend`` is the name of the one at fault, if known."""

    def __init__(self, reason: str, backend: str | None = None) -> None:
        super().__init__(reason)
        self.backend = backend


class PluginHost:
    """The plugins of this process. Discovery happens once, on first use; several threads may use one host.

    Args:
        plugins: Plugins by name (modules, objects or classes without arguments), instead of the entry points.
        disabled: Names of plugins or distributions not to load, besides those of ``POLYDRAFT_DISABLE_PLUGINS``.
        environ: The environment to read; default ``os.environ``.
    """

    def __init__(
        self,
        plugins: Mapping[str, Any] | None = None,
        *,
        disabled: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        variable = (os.environ if environ is None else environ).get(_VARIABLE, "")
        names = [*disabled, *variable.split(",")]
        self._disabled = frozenset(canonicalize_name(name.strip()) for name in names if name.strip())
        self._given = None if plugins is None else dict(plugins)
        self._lock = threading.RLock()  # re-entrant: a backend's module may ask for the host while it is imported
        self._loaded: dict[str, list[Record]] | None = None
        self._loading: set[int] = set()  # threads in which a plugin is imported or asked
        self._statuses: list[PluginStatus] = []
        self._notes: list[str] = []
        self._instances: dict[str, Backend] = {}

    def backends(self) -> dict[str, BackendRecord]:
        """The records of all backends, by name, in alphabetical order."""
        found = {record.name: record for record in self._records(BackendRecord)}
        return dict(sorted(found.items()))

    def pairs(self) -> list[tuple[str, PairRecord]]:
        """The pairs of all plugins, each with its plugin's name."""
        return [(name, pair) for name, loaded in self._discover().items() for pair in _of(PairRecord, loaded)]

    def faults(self) -> list[FaultRecord]:
        """The known faults of all plugins."""
        return self._records(FaultRecord)

    def local_models(self) -> dict[str, LocalModelRecord]:
        """The models that plugins contain, by name."""
        return {record.name: record for record in self._records(LocalModelRecord)}

    def caches(self) -> list[CacheRecord]:
        """The folders in which plugins keep files, by name."""
        return sorted(self._records(CacheRecord), key=lambda cache: cache.name)

    def statuses(self) -> list[PluginStatus]:
        """Every plugin that was found, loaded or not, by name."""
        self._discover()
        return sorted(self._statuses, key=lambda status: (status.name, status.distribution or ""))

    def notes(self) -> list[str]:
        """Sentences about the plugin settings themselves, such as a disabled name that no plugin has."""
        self._discover()
        return list(self._notes)

    def backend(self, name: str) -> Backend:
        """The backend of that name; its module is imported now, its engine not yet.

        Raises:
            BackendNotFoundError: No such backend is installed, or its plugin is disabled.
            PluginError: Its plugin is broken, or its class cannot be imported or is not a ``Backend``.
        """
        record = self.backends().get(name)
        if record is None:
            raise self._not_found(name)
        if name not in self._instances:
            made = _instantiate(record)  # without the lock: an import that hangs must not keep others waiting
            with self._lock:
                self._instances.setdefault(name, made)
        return self._instances[name]

    def _records(self, kind: type[R]) -> list[R]:
        return [record for loaded in self._discover().values() for record in _of(kind, loaded)]

    def _not_found(self, name: str) -> PluginError | BackendNotFoundError:
        from polydraft._registry.backends import not_installed_hint

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
        hint = not_installed_hint(name, installed=list(self.backends()))
        return BackendNotFoundError(
            f"There is no backend {name!r}.", f"{hint} Broken plugins: {'; '.join(broken)}." if broken else hint
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
                elif status.name in loaded:
                    owner = homes[status.name] or "the caller"
                    raise _BrokenPlugin(f"Another plugin is already named {status.name!r}, that of {owner}.")
                else:
                    homes[status.name] = status.distribution or ""
                    mine = self._load(status.name, load)
                    _check_names(mine, loaded)
                    # After all checks: nothing of a broken plugin is ever visible.
                    loaded[status.name] = mine
                    outcome = {"backends": tuple(record.name for record in _of(BackendRecord, mine))}
            except _BrokenPlugin as reason:
                at_fault = (reason.backend,) if reason.backend else ()
                outcome = {"state": "broken", "reason": str(reason), "backends": at_fault}
            self._statuses.append(status.model_copy(update=outcome))
        self._notes = [f"{_VARIABLE} names {name!r}, but no plugin has that name." for name in sorted(unused)]
        self._notes += unreadable
        return loaded

    def _find(self) -> tuple[list[_Found], list[str]]:
        """The plugins in the order in which they may claim names, and notes on packages that cannot be read.

        polydraft's own come first, then by plugin name and distribution.
        """
        if self._given is not None:
            return [(PluginStatus(name=name), partial(self._given.__getitem__, name)) for name in self._given], []
        found, unreadable = _installed()
        own = {canonicalize_name(table["distribution"]) for table in core_table("plugin")}

        # Entry points come in the order of the file system, and the first plugin keeps a name that two claim.
        def rank(plugin: _Found) -> tuple[bool, str, str]:
            home = plugin[0].distribution or ""
            return canonicalize_name(home) not in own, plugin[0].name, home

        return sorted(found, key=rank), unreadable

    def _load(self, name: str, load: Callable[[], Any]) -> list[Record]:
        """Import one plugin and ask it for its records, each within a time limit; the working directory is kept."""
        folder = _working_directory()
        try:
            plugin = self._within(_IMPORT_LIMIT, "Its import", partial(_import, name, load))
            return self._within(_HOOKS_LIMIT, "Its hooks", partial(_ask_all, name, plugin))
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
            raise _BrokenPlugin(f"{what} did not end within {seconds:g} seconds.") from None


def _working_directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 - a string is enough, and this runs at every start
    except OSError:  # it was removed
        return None


def _installed() -> tuple[list[_Found], list[str]]:
    """The entry points of the group, and notes on packages whose entry points cannot be read.

    One package after the other, which ``importlib.metadata.entry_points`` does not: one malformed file ends it.
    """
    found: list[_Found] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    for package in distributions():
        try:
            text = package.read_text("entry_points.txt")
        except Exception as error:  # not UTF-8, for example: whether it has a plugin is not known
            unreadable.append(f"The entry points of {_title(package)} cannot be read: {_describe(error)}.")
            continue
        if not text or ENTRY_POINT_GROUP not in text:
            continue
        name, version = _identity(package)
        if name is not None and canonicalize_name(name) in seen:
            continue  # an older copy later on the path
        seen.add(canonicalize_name(name or ""))
        status = PluginStatus(name=name or "unknown", distribution=name, version=version)
        try:
            counts = package if name is None else _first_on_path(name) or package
            found += [
                (status.model_copy(update={"name": entry.name}), entry.load)
                for entry in counts.entry_points.select(group=ENTRY_POINT_GROUP)
            ]
        except Exception as error:
            broken = {"state": "broken", "reason": f"Its entry_points.txt cannot be read: {_describe(error)}."}
            found.append((status.model_copy(update=broken), dict))
    return found, unreadable


def _title(package: Distribution) -> str:
    return " ".join(part for part in _identity(package) if part) or "a package without metadata"


def _identity(package: Distribution) -> tuple[str | None, str | None]:
    """Name and version of a package; None where its metadata does not say."""
    try:
        metadata: Any = package.metadata
        name, version = metadata.get("Name"), metadata.get("Version")
    except Exception:  # no metadata, or unreadable ones
        return None, None
    return str(name) if name else None, str(version) if version else None


def _first_on_path(name: str) -> Distribution | None:
    """The package that counts of several of one name; None if its folder has another name."""
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError):
        return None


def _of(kind: type[R], records: Iterable[Record]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]


def _import(name: str, load: Callable[[], Any]) -> Any:
    try:
        # A module may even call sys.exit() when it is imported. Ctrl+C reaches only the thread that waits.
        plugin = load()
        return plugin() if inspect.isclass(plugin) else plugin
    except BaseException as error:
        if refused := exhausted(error, f"The plugin {name} cannot be imported"):
            raise refused from error
        raise _BrokenPlugin(f"It cannot be imported: {_describe(error)}.") from error


def _ask_all(name: str, plugin: Any) -> list[Record]:
    """Register one plugin and call its hooks. Each has a separate manager, so that none can affect another."""
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(PolydraftSpec)
    try:
        manager.register(plugin, name=name)
    except BaseException as error:  # pluggy looks at every attribute, so a plugin may raise anything here
        raise _BrokenPlugin(f"It cannot be registered: {_describe(error)}.") from error
    _check_unknown_hooks(manager, plugin)
    return [record for hook, kind in _HOOKS.items() for record in _ask(getattr(manager.hook, hook), hook, kind)]


def _ask(caller: Callable[[], Any], hook: str, kind: type[Record]) -> list[Record]:
    """Call one hook of one plugin and check the records."""
    records: list[Record] = []
    try:
        # Inside the ``try``: a hook may return a generator, which fails only when it is read.
        for result in caller():
            if isinstance(result, Record):
                raise _BrokenPlugin(f"{hook} gives one {type(result).__name__}, not a list of them.")
            records.extend(_checked(record, hook, kind) for record in islice(result, _MOST_RECORDS + 1))
        if len(records) > _MOST_RECORDS:
            raise _BrokenPlugin(f"{hook} gives more than {_MOST_RECORDS} records.")
    except _BrokenPlugin:
        raise
    except ValidationError as error:
        raise _BrokenPlugin(f"{hook} makes an invalid record: {_describe_invalid(error)}.") from error
    except BaseException as error:
        if refused := exhausted(error, f"{hook} of a plugin fails"):
            raise refused from error
        raise _BrokenPlugin(f"{hook} fails: {_describe(error)}.") from error
    return records


def _checked(given: Any, hook: str, kind: type[Record]) -> Record:
    if not isinstance(given, kind):
        raise _BrokenPlugin(f"{hook} gives a {type(given).__name__}, not a {kind.__name__}.")
    # Again: a record that was copied with changes, or constructed without validation, has not been checked.
    record = type(given).model_validate(vars(given))
    if isinstance(record, BackendRecord) and record.contract_version != CONTRACT_VERSION:
        newer = record.contract_version > CONTRACT_VERSION
        raise _BrokenPlugin(
            f"Its backend {record.name!r} was written for version {record.contract_version} of the contract, this "
            f"polydraft has version {CONTRACT_VERSION}: update {'polydraft' if newer else 'the plugin'}.",
            record.name,
        )
    try:
        _check_contents(record)
    except ValueError as error:
        raise _BrokenPlugin(f"{hook} makes an invalid record: {_first_line(error)}.") from error
    return record


def _check_contents(record: Record) -> None:
    """Check what the records' types do not express: PEP 440 version ranges, at most one group in a pair's ids."""
    from packaging.specifiers import SpecifierSet

    if isinstance(record, BackendRecord):
        for specifier in record.requires.values():
            SpecifierSet(specifier)
    elif isinstance(record, FaultRecord):
        SpecifierSet(record.versions)
    elif isinstance(record, PairRecord):
        check_pair_record(record)


def _check_unknown_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Refuse unknown hooks: a misspelt one would never be called (``optionalhook=True``: of another version)."""
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec() and not all(impl.optionalhook for impl in caller.get_hookimpls()):
            raise _BrokenPlugin(f"It implements an unknown hook, {caller.name!r}.")


def _check_names(mine: Iterable[Record], others: Mapping[str, Iterable[Record]]) -> None:
    """Check that names of backends and local models are unique; the plugin that comes first keeps them."""
    taken = {name: plugin for plugin, loaded in others.items() for name in _names(loaded)}
    seen: set[tuple[str, str]] = set()
    for what, name in _names(mine):
        owner = taken.get((what, name))
        if owner is not None:
            raise _BrokenPlugin(f"Its {what} {name!r} is already provided by the plugin {owner!r}.")
        if (what, name) in seen:
            raise _BrokenPlugin(f"It provides the {what} {name!r} twice.")
        seen.add((what, name))


def _names(records: Iterable[Record]) -> list[tuple[str, str]]:
    kinds: dict[str, type[BackendRecord | LocalModelRecord | CacheRecord]] = {
        "backend": BackendRecord,
        "local model": LocalModelRecord,
        "cache": CacheRecord,
    }
    return [(what, one.name) for what, kind in kinds.items() for one in _of(kind, records)]


@contextmanager
def plugin_errors(backend: str) -> Iterator[None]:
    """Raise what a backend's own code raises in this block as a ``PluginError``; polydraft's errors pass."""
    try:
        yield
    except PolydraftError:
        raise
    except BaseException as error:
        if is_callers_own(error):
            raise
        raise PluginError(f"The backend {backend!r} fails: {_describe(error)}.", "Report it to its author.") from error


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
            f"The backend {record.name!r} cannot be made from {record.factory}: {_describe(error)}.",
            f"Install it again: {record.install_hint}",
        ) from error
    if not isinstance(backend, Backend):
        raise PluginError(
            f"{record.factory} of the backend {record.name!r} is not a Backend.", "Report it to the plugin's author."
        )
    return backend


def _describe_invalid(error: ValidationError) -> str:
    """The first error of a record, as part of a sentence: the record, the field, what is wrong."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{error.title}{'.' if where else ''}{where}: {first['msg']}{more}"


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {_first_line(error)}"
    except Exception:  # its own __str__ fails
        return type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")


@cache
def default_host() -> PluginHost:
    """The host of the installed plugins, made on first use."""
    return PluginHost()
