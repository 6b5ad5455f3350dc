"""Engines that ``polydraft engines install`` installs, from the core's data: what each needs, in which versions."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Literal

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import Field

from polydraft._registry.tables import core_table
from polydraft.contract.records import Record

__all__ = [
    "Accelerator",
    "KnownEngine",
    "Step",
    "Variant",
    "engine_of",
    "is_engine_name",
    "known_engines",
    "pinned_versions",
]

Accelerator = Literal["cpu", "cuda", "metal"]


class Step(Record):
    """One step of an installation; exactly one of ``install``, ``compile``, ``remove`` and ``plugin`` is given."""

    install: tuple[str, ...] = ()
    """Requirements, in the tested versions."""
    build: str = ""
    """The local version that they must have, such as ``cpu`` for torch 2.13.0+cpu."""
    index: str = ""
    """A further package index, asked only if the user's own have no such build."""
    compile: tuple[str, ...] = ()
    """Packages to be compiled for this processor; their wheels are kept."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for compiling, unless the user has set them."""
    remove: tuple[str, ...] = ()
    """What an earlier step brought along, and does not fit."""
    plugin: bool = False
    """polydraft, the plugin and the built-in pairs. Without such a step they come last."""


class Variant(Record):
    """One way of installing an engine."""

    accelerator: Accelerator
    needs: str = ""
    """PEP 508 marker of the platforms; empty: all."""
    glibc: str = ""
    """The oldest glibc that its packages run with; empty: they do not depend on it."""
    programs: tuple[str, ...] = ()
    """Programs that must be on the PATH; ``a|b``: one of them."""
    steps: tuple[Step, ...] = ()
    disk_mb: int
    """About how many megabytes (10**6 bytes) the environment takes."""
    minutes: int
    """About how long the installation takes."""

    @property
    def fits(self) -> bool:
        """Whether there are packages for this platform."""
        return not self.needs or Marker(self.needs).evaluate()

    def all_steps(self) -> tuple[Step, ...]:
        """Its steps, that of polydraft itself included."""
        return self.steps if any(step.plugin for step in self.steps) else (*self.steps, Step(plugin=True))


class KnownEngine(Record):
    """An engine with the plugin that runs it."""

    name: str
    """The plugin's name, that of its entry point."""
    distribution: str
    """The plugin's distribution."""
    folder: str = ""
    """The distribution's folder in a clone of polydraft."""
    also: dict[str, str] = Field(default_factory=dict)
    """Further distributions of polydraft that the plugin needs -> their folders in a clone."""
    backends: tuple[str, ...] = ()
    python: str = ">=3.11,<3.14"
    """Versions of Python for which there are packages."""
    tested: str = ""
    """The file of versions that were tested together, in ``data/tested``."""
    self_test: dict[str, str] = Field(default_factory=dict)
    """Backend -> the model that it decodes before its environment counts as usable."""
    variants: tuple[Variant, ...] = Field(alias="variant")


@cache
def known_engines() -> dict[str, KnownEngine]:
    """The core's list, by name."""
    found = [KnownEngine.model_validate(table) for table in core_table("engine")]
    return {engine.name: engine for engine in found}


def is_engine_name(text: str) -> bool:
    """Whether a text can be an engine's name, which names its folder."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) is not None


def engine_of(backend: str) -> KnownEngine | None:
    """The engine whose plugin provides a backend, from its name; None if polydraft knows none."""
    return next((engine for engine in known_engines().values() if backend in engine.backends), None)


def pinned_versions(name: str) -> dict[str, str]:
    """Canonical distribution name -> the tested version, from a file in ``data/tested``; empty if ``name`` is."""
    found: dict[str, str] = {}
    if name:
        text = files("polydraft._registry").joinpath("data", "tested", name).read_text(encoding="utf-8")
        for line in (line.partition("#")[0].strip() for line in text.splitlines()):
            if line.startswith("-c "):
                found |= pinned_versions(line.removeprefix("-c ").strip())
            elif line:
                requirement = Requirement(line)
                found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found
