"""Known faults of engines, matched against the installed versions."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name

from polydraft._registry.tables import core_table
from polydraft._registry.versions import VersionLookup, in_range, installed_version
from polydraft.contract.records import BackendRecord, FaultRecord
from polydraft.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from polydraft._environments.records import Environment
    from polydraft._plugins import PluginHost

__all__ = ["FaultRegistry", "core_faults", "distributions", "fault_sentences"]


@cache
def core_faults() -> tuple[FaultRecord, ...]:
    """The faults of the core's own list."""
    return tuple(FaultRecord.model_validate(table) for table in core_table("fault"))


class FaultRegistry:
    """Faults of plugins and of the core.

    Args:
        faults: The faults; of several with one id, the first counts.
        lookup: Gives installed versions.
        home: Gives the environment that a backend of a name runs in; None: this process's own.
    """

    def __init__(
        self,
        faults: Iterable[FaultRecord],
        lookup: VersionLookup = installed_version,
        home: Callable[[str], Environment | None] = lambda name: None,
    ) -> None:
        by_id: dict[str, FaultRecord] = {}
        for fault in faults:
            by_id.setdefault(fault.id, fault)
        self.faults = tuple(by_id.values())
        self._lookup = lookup
        self._home = home

    @classmethod
    def of(cls, host: PluginHost, lookup: VersionLookup = installed_version) -> FaultRegistry:
        """The faults of plugins (which may correct the core's, by id), then the core's."""
        return cls([*host.faults(), *core_faults()], lookup, host.home)

    def lookup(self, backend: BackendRecord, distribution: str) -> str | None:
        """The version of a distribution where a backend runs; None if it is not installed there."""
        environment = self._home(backend.name)
        if environment is None:
            return self._lookup(distribution)
        return environment.versions.get(canonicalize_name(distribution))

    def faults_for(
        self,
        distribution: str,
        version: str,
        *,
        affects: Iterable[str] | None = None,
        model_types: Iterable[str] | None = None,
    ) -> list[FaultRecord]:
        """The faults of one version of an engine.

        Args:
            distribution: Name on the package index; letter case, '-', '_' and '.' do not count.
            version: The installed one.
            affects: What will be used (``mtp``, ``sampling``, ...); None: everything. ``all`` always counts.
            model_types: ``model_type`` of target and drafter; None: whatever the model. A fault that names
                architectures counts if it names one of these.
        """
        wanted = None if affects is None else {*affects, "all"}
        types = None if model_types is None else set(model_types)
        return [
            fault
            for fault in self.faults
            if canonicalize_name(fault.distribution) == canonicalize_name(distribution)
            and (wanted is None or fault.affects in wanted)
            and (types is None or not fault.architectures or types & set(fault.architectures))
            and in_range(version, fault.versions)
        ]

    def faults_of(
        self, backend: BackendRecord, *, affects: Iterable[str] | None = None, model_types: Iterable[str] | None = None
    ) -> list[tuple[FaultRecord, str]]:
        """The faults of the installed versions of a backend's engine and requirements, each with that version."""
        affects = None if affects is None else list(affects)
        model_types = None if model_types is None else list(model_types)
        return [
            (fault, version)
            for name in distributions(backend)
            if (version := self.lookup(backend, name)) is not None
            for fault in self.faults_for(name, version, affects=affects, model_types=model_types)
        ]

    def refusal(
        self, backend: BackendRecord, affects: Iterable[str], model_types: Iterable[str]
    ) -> tuple[FaultRecord, str] | None:
        """The first fault that forbids what will be used, with the installed version; None if none does."""
        found = self.faults_of(backend, affects=affects, model_types=model_types)
        return next((entry for entry in found if entry[0].severity == "refuse"), None)

    def check(self, backend: BackendRecord, affects: Iterable[str], model_types: Iterable[str]) -> None:
        """Raise if a known fault forbids what will be used.

        Raises:
            BackendUnavailableError: An installed version has such a fault.
        """
        found = self.refusal(backend, affects, model_types)
        if found is not None:
            raise BackendUnavailableError(*fault_sentences(*found))


def distributions(backend: BackendRecord) -> list[str]:
    """The distributions of a backend's engine and requirements, once each."""
    return list(dict.fromkeys(name.strip() for key in (backend.engine, *backend.requires) for name in key.split("|")))


def fault_sentences(fault: FaultRecord, version: str) -> tuple[str, str]:
    """The message and the hint of an error."""
    link = f" See {fault.link}." if fault.link else ""
    return f"{fault.distribution} {version} has a known fault: {fault.summary}", f"{fault.remedy}{link}"
