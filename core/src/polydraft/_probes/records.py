"""What child processes answer: the state of one backend, or everything that the plugins of an interpreter offer."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from polydraft._registry.states import BackendState
from polydraft.contract.records import (
    BackendRecord,
    CacheRecord,
    Capabilities,
    FaultRecord,
    LocalModelRecord,
    PairRecord,
    Record,
)

__all__ = ["Answer", "CataloguedBackend", "PluginCatalogue"]


class CataloguedBackend(Record):
    """One backend of an interpreter, as its own process reported it."""

    record: BackendRecord
    plugin: str = Field(description="The plugin's name.")
    distribution: str | None = Field(default=None, description="The plugin's distribution.")
    version: str | None = Field(default=None, description="That distribution's version.")
    versions: dict[str, str] = Field(
        default_factory=dict, description="The installed ones of the distributions that the record names."
    )
    state: BackendState | None = Field(
        default=None, description="Whether it can run there; None while it has not been asked."
    )
    capabilities: Capabilities | None = Field(default=None, description="None if it could not be asked.")
    options_schema: dict[str, Any] | None = Field(
        default=None, description="JSON schema of its ``engine_options``; None if it could not be asked."
    )


class PluginCatalogue(Record):
    """What the hooks of all plugins of an interpreter give."""

    polydraft: str = Field(description="The version of the core there.")
    contract_version: int
    python: str = Field(description="The interpreter's version: ``3.12.4``.")
    backends: tuple[CataloguedBackend, ...] = ()
    pairs: tuple[tuple[str, PairRecord], ...] = Field(default=(), description="Each with its plugin's name.")
    faults: tuple[FaultRecord, ...] = ()
    local_models: tuple[LocalModelRecord, ...] = ()
    caches: tuple[CacheRecord, ...] = ()
    broken: dict[str, str] = Field(default_factory=dict, description="Plugins that are not used there, and why.")


class Answer(Record):
    """What came back from one child process, or why nothing did."""

    backend: str = Field(default="", description="The backend that was asked; empty for a catalogue.")
    state: BackendState | None = None
    capabilities: Capabilities | None = None
    options_schema: dict[str, Any] | None = None
    serves: bool | None = Field(default=None, description="Whether the backend has a server; None: not known.")
    catalogue: PluginCatalogue | None = None
    problem: str = Field(
        default="", description="Why there is no answer, the rest of a sentence: ``was killed by SIGABRT.``"
    )
    seconds: float = Field(default=0.0, description="How long it took.")

    def state_of(self, record: BackendRecord) -> BackendState:
        """The state that it gives, or that of a backend whose diagnosis gave no answer."""
        if self.state is not None:
            return self.state
        return BackendState(
            record=record,
            problem=f"Its diagnosis {self.problem}",
            remedy=f"Install it again: {record.install_hint}",
        )
