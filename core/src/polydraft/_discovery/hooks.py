"""One plugin's hooks: it is imported, asked for its records, and all that it gives is checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

import pluggy
from pydantic import ValidationError

from polydraft._containment import described, first_line

# Same floor: plugins' records are checked like the registry's own.
from polydraft._registry.tables import check_pair_record
from polydraft.contract.hookspecs import PROJECT_NAME, PolydraftSpec
from polydraft.contract.records import (
    CONTRACT_VERSION,
    BackendRecord,
    CacheRecord,
    FaultRecord,
    LocalModelRecord,
    PairRecord,
    Record,
)
from polydraft.files import exhausted

__all__ = ["BrokenPlugin", "ask_all", "check_names", "import_plugin", "of_kind"]

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


class BrokenPlugin(Exception):  # noqa: N818 - caught by ``PluginHost``, never seen outside
    """Why a plugin is not used, one sentence; ``backend`` is the name of the one at fault, if known."""

    def __init__(self, reason: str, backend: str | None = None) -> None:
        super().__init__(reason)
        self.backend = backend


def of_kind(kind: type[R], records: Iterable[Record]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]


def import_plugin(name: str, load: Callable[[], Any]) -> Any:
    try:
        # A module may even call sys.exit() when it is imported. Ctrl+C reaches only the thread that waits.
        plugin = load()
        return plugin() if inspect.isclass(plugin) else plugin
    except BaseException as error:
        if refused := exhausted(error, f"The plugin {name} cannot be imported"):
            raise refused from error
        raise BrokenPlugin(f"It cannot be imported: {described(error)}.") from error


def ask_all(name: str, plugin: Any) -> list[Record]:
    """Register one plugin and call its hooks. Each has a separate manager, so that none can affect another."""
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(PolydraftSpec)
    try:
        manager.register(plugin, name=name)
    except BaseException as error:  # pluggy looks at every attribute, so a plugin may raise anything here
        raise BrokenPlugin(f"It cannot be registered: {described(error)}.") from error
    _check_unknown_hooks(manager, plugin)
    return [record for hook, kind in _HOOKS.items() for record in _ask(getattr(manager.hook, hook), hook, kind)]


def _ask(caller: Callable[[], Any], hook: str, kind: type[Record]) -> list[Record]:
    """Call one hook of one plugin and check the records."""
    records: list[Record] = []
    try:
        # Inside the ``try``: a hook may return a generator, which fails only when it is read.
        for result in caller():
            if isinstance(result, Record):
                raise BrokenPlugin(f"{hook} gives one {type(result).__name__}, not a list of them.")
            records.extend(_checked(record, hook, kind) for record in islice(result, _MOST_RECORDS + 1))
        if len(records) > _MOST_RECORDS:
            raise BrokenPlugin(f"{hook} gives more than {_MOST_RECORDS} records.")
    except BrokenPlugin:
        raise
    except ValidationError as error:
        raise BrokenPlugin(f"{hook} makes an invalid record: {_describe_invalid(error)}.") from error
    except BaseException as error:
        if refused := exhausted(error, f"{hook} of a plugin fails"):
            raise refused from error
        raise BrokenPlugin(f"{hook} fails: {described(error)}.") from error
    return records


def _checked(given: Any, hook: str, kind: type[Record]) -> Record:
    if not isinstance(given, kind):
        raise BrokenPlugin(f"{hook} gives a {type(given).__name__}, not a {kind.__name__}.")
    # Again: a record that was copied with changes, or constructed without validation, has not been checked.
    record = type(given).model_validate(vars(given))
    if isinstance(record, BackendRecord) and record.contract_version != CONTRACT_VERSION:
        newer = record.contract_version > CONTRACT_VERSION
        raise BrokenPlugin(
            f"Its backend {record.name!r} was written for version {record.contract_version} of the contract, this "
            f"polydraft has version {CONTRACT_VERSION}: update {'polydraft' if newer else 'the plugin'}.",
            record.name,
        )
    try:
        _check_contents(record)
    except ValueError as error:
        raise BrokenPlugin(f"{hook} makes an invalid record: {first_line(error)}.") from error
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
            raise BrokenPlugin(f"It implements an unknown hook, {caller.name!r}.")


def check_names(mine: Iterable[Record], others: Mapping[str, Iterable[Record]]) -> None:
    """Check that names of backends and local models are unique; the plugin that comes first keeps them."""
    taken = {name: plugin for plugin, loaded in others.items() for name in _names(loaded)}
    seen: set[tuple[str, str]] = set()
    for what, name in _names(mine):
        owner = taken.get((what, name))
        if owner is not None:
            raise BrokenPlugin(f"Its {what} {name!r} is already provided by the plugin {owner!r}.")
        if (what, name) in seen:
            raise BrokenPlugin(f"It provides the {what} {name!r} twice.")
        seen.add((what, name))


def _names(records: Iterable[Record]) -> list[tuple[str, str]]:
    kinds: dict[str, type[BackendRecord | LocalModelRecord | CacheRecord]] = {
        "backend": BackendRecord,
        "local model": LocalModelRecord,
        "cache": CacheRecord,
    }
    return [(what, one.name) for what, kind in kinds.items() for one in of_kind(kind, records)]


def _describe_invalid(error: ValidationError) -> str:
    """The first error of a record, as part of a sentence: the record, the field, what is wrong."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{error.title}{'.' if where else ''}{where}: {first['msg']}{more}"
