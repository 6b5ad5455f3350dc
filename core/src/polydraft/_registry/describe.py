"""The records that ``polydraft backends``, ``pairs`` and ``doctor`` show. No network, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polydraft._discovery.installed import PluginStatus
from polydraft._plugins import PluginHost, default_host
from polydraft._probes.asking import find_deadly_plugins
from polydraft._probes.interpreter import own_python
from polydraft._probes.kept import have_survived, note_survival
from polydraft._registry.backends import KnownBackend, known_backends
from polydraft._registry.diagnosing import diagnose_all
from polydraft._registry.faults import FaultRegistry
from polydraft._registry.pairs import DEFAULT_K, PairRegistry, RegisteredPair
from polydraft._registry.states import BackendState
from polydraft._registry.versions import VersionLookup, installed_version
from polydraft.contract.records import DrafterKind, FaultRecord, PairRecord, Record

__all__ = [
    "BackendDescription",
    "PairDescription",
    "describe_backends",
    "describe_pairs",
    "missing_backends",
    "model_without_pair",
    "plugins_without_backend",
    "surviving_host",
]


SURVEY_LIMIT = 7.0
"""Seconds for the diagnosis of each backend, what it waits for a processor or a disk excluded."""
_HOOKS_LIMIT = 2.0
"""The same for the hooks of all plugins."""


class BackendDescription(Record):
    """A backend with the plugin that provides it."""

    state: BackendState
    plugin: PluginStatus | None = None
    folder: Path | None = None
    """The environment that it runs in; None: this process's own."""
    serves: bool | None = None
    """Whether it has a server; None: not known."""


class PairDescription(Record):
    """A pair, and the backends that run it here."""

    entry: RegisteredPair
    backends: tuple[str, ...]
    """Installed backends that load the format and run the kind of drafter."""
    num_speculative_tokens: dict[str, int]
    """k by backend, for those of ``backends``; ``*``: the registry's general recommendation, or the default 4."""
    faults: tuple[FaultRecord, ...]
    """Known faults of installed versions that affect this kind of drafter on one of those backends."""
    can_run: bool = True
    """Whether an installed backend has this kind of drafter, and one that can be installed loads the format; True where
    no backend is installed."""


def surviving_host(*, kept: bool = False) -> PluginHost:
    """The installed plugins without those that would end this process, or keep it waiting, when they are imported.

    For ``doctor`` and ``backends``, which tell what is wrong: a process of its own tries first. The others are broken.
    With ``kept`` it does not try again what all have survived, until one of them or anything that is installed changes.
    """
    host, python = default_host(), own_python()
    if python is None or not host.crosses or (kept and have_survived()):
        return host
    deadly = find_deadly_plugins(python, host.found_names, seconds=_HOOKS_LIMIT)
    if deadly:
        return PluginHost(broken=deadly, environments=host.uses_environments)
    note_survival()
    return host


def describe_backends(
    host: PluginHost | None = None, *, lookup: VersionLookup = installed_version, kept: bool = False
) -> list[BackendDescription]:
    """All backends, each with its diagnosis, problems and plugin; ``plugins_without_backend`` has the rest.

    Each backend of the installed plugins is asked in a process of its own (``diagnose_all``), unless ``kept`` allows an
    answer of before.
    """
    host = default_host() if host is None else host
    faults = FaultRegistry.of(host, lookup)
    plugins = {name: status for status in host.statuses() if status.state == "loaded" for name in status.backends}
    answers = diagnose_all(host, host.backends().values(), faults, seconds=SURVEY_LIMIT, kept=kept, here=False)
    return [
        BackendDescription(
            state=answers[name].state_of(record),
            plugin=plugins.get(name),
            folder=home.folder if (home := host.home(name)) is not None else None,
            serves=answers[name].serves,
        )
        for name, record in host.backends().items()
    ]


def plugins_without_backend(host: PluginHost | None = None) -> list[PluginStatus]:
    """Plugins that are broken or disabled, which ``describe_backends`` does not show."""
    host = default_host() if host is None else host
    return [status for status in host.statuses() if status.state != "loaded"]


def missing_backends(installed: Iterable[BackendDescription], others: Iterable[PluginStatus]) -> list[KnownBackend]:
    """Backends that are known by name, but not installed; ``others`` are broken and disabled plugins."""
    there = {found.state.record.name for found in installed}
    # A broken plugin is installed: the command that installs it would not fix it.
    there |= {name for status in others for name in (status.name, *status.backends)}
    return [known for known in known_backends() if known.name not in there]


def describe_pairs(
    host: PluginHost | None = None, *, target: str | None = None, lookup: VersionLookup = installed_version
) -> list[PairDescription]:
    """The pairs of a target (or all), in the order in which ``drafter="auto"`` considers them.

    Faults that are bound to an architecture are listed for every pair of that kind: the registry does not know the
    architecture of a pair before its config is read.

    Raises:
        InvalidRequestError: The user's file of pairs is broken.
    """
    host = default_host() if host is None else host
    registry = PairRegistry.of(host)
    faults = FaultRegistry.of(host, lookup)
    return [_pair(entry, host, faults) for entry in (registry.find(target) if target else registry.entries)]


def _pair(entry: RegisteredPair, host: PluginHost, faults: FaultRegistry) -> PairDescription:
    pair = entry.pair
    able = [
        record
        for record in host.backends().values()
        if pair.format in record.formats and pair.kind in record.drafter_kinds
    ]
    records = host.backends().values()
    kinds = {kind for record in records for kind in record.drafter_kinds}
    formats = {form for record in records for form in record.formats}
    formats |= {form for known in known_backends() if known.install for form in known.formats}
    found = {fault.id: fault for record in able for fault, _ in faults.faults_of(record, affects=[pair.kind])}
    return PairDescription(
        entry=entry,
        backends=tuple(record.name for record in able),
        num_speculative_tokens={
            "*": pair.num_speculative_tokens.get("*", DEFAULT_K),
            **{record.name: entry.num_speculative_tokens(record.name) or DEFAULT_K for record in able},
        },
        faults=tuple(found.values()),
        can_run=not records or (pair.kind in kinds and pair.format in formats),
    )


def model_without_pair(
    target: str, form: str, drafter: str | None, kind: DrafterKind, host: PluginHost | None = None
) -> PairDescription:
    """A model that the registry does not know, of a format, with the drafter and kind that ``load`` would take."""
    host = default_host() if host is None else host
    pair = PairRecord(target=target, drafter=drafter, kind=kind, format=form)
    return _pair(RegisteredPair(pair=pair, origin="core", source="polydraft"), host, FaultRegistry.of(host))
