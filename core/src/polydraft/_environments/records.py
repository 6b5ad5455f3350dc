"""What is known of an environment, of where it came from, and of an engine on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from polydraft._probes.records import CataloguedBackend, PluginCatalogue
from polydraft._registry.engines import Accelerator
from polydraft.contract.records import BackendRecord, Record

__all__ = ["EngineState", "Environment", "SelfTest", "Source"]


class Source(Record):
    """Where polydraft and its plugins are installed from."""

    kind: Literal["clone", "wheels", "index"]
    folder: Path | None = None
    """The clone, or the folder of wheels."""
    editable: bool = False
    """Whether a clone's code is used where it lies, as the running polydraft's is."""

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        if (self.folder is None) != (self.kind == "index"):
            raise ValueError("a clone and wheels have a folder, the index has none")
        return self

    def __str__(self) -> str:
        if self.kind == "clone":
            return f"the clone {self.folder}" + (", which stays in use" if self.editable else "")
        return f"the wheels in {self.folder}" if self.kind == "wheels" else "the package index"


class SelfTest(Record):
    """That a backend decoded a model greedily, with speculation and plainly, to the same tokens."""

    backend: str
    target: str
    device: str
    tokens: int
    acceptance_rate: float | None
    seconds: float
    """Loading included."""


class Environment(Record):
    """A virtual environment with the core, one plugin and its engine, as its state file tells."""

    format: int
    name: str
    """The engine, which is the plugin's name."""
    build: int
    """Each installation has a number of its own."""
    folder: Path
    """The virtual environment."""
    python: Path
    """Its interpreter."""
    python_version: str
    python_wanted: str = ""
    """The one that the user named, if any."""
    accelerator: Accelerator
    packages: tuple[str, ...] = ()
    """What the user named instead of a plugin that polydraft knows."""
    source: Source
    stamp: str = ""
    """Changes if the files that were installed change; empty: they are not looked at."""
    plan: str
    """Changes if the registry installs something else."""
    polydraft: str
    """The core's version."""
    contract_version: int
    versions: dict[str, str]
    """All distributions in it, by canonical name."""
    proofs: tuple[Path, ...]
    """Paths that are there as long as it is whole."""
    catalogue: PluginCatalogue
    self_tests: tuple[SelfTest, ...] = ()
    notes: tuple[str, ...] = ()
    bytes: int
    installed: str
    """When, ISO 8601 in UTC."""

    @property
    def backends(self) -> dict[str, BackendRecord]:
        """Records of its backends, by name."""
        return {found.record.name: found.record for found in self.catalogue.backends}

    def backend(self, name: str) -> CataloguedBackend:
        """What is known of one of its backends."""
        return next(found for found in self.catalogue.backends if found.record.name == name)


class EngineState(Record):
    """An engine on this machine: whether it is installed, and if not, what installing it takes."""

    name: str
    """For ``polydraft engines install NAME``."""
    state: Literal["installed here", "installed", "not installed", "broken"]
    """``installed here``: in this process's own environment. ``installed``: in an environment of its own."""
    reason: str = ""
    """Why it is broken, one sentence."""
    backends: tuple[str, ...] = ()
    """What ``load(backend=...)`` takes."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Installed versions of polydraft, the plugin and the engine."""
    folder: Path | None = None
    """The environment's folder."""
    python: Path | None = None
    """The environment's interpreter."""
    accelerator: Accelerator | None = None
    """What the environment was made for, or what an installation would be for."""
    disk_bytes: int | None = None
    """What it takes on disk, or about what it would take."""
    minutes: int | None = None
    """About how long an installation takes."""
    why_not: str = ""
    """Why it cannot be installed on this machine, and what to do, in two sentences; empty if it can."""
    update: str = ""
    """Why an update is worth while, one sentence; empty: it is up to date."""
    command: str = ""
    """What installs, updates or mends it; empty: nothing to do, or it cannot be installed."""

    @property
    def usable(self) -> bool:
        """Whether it is installed, here or in its own environment."""
        return self.state in {"installed here", "installed"}
