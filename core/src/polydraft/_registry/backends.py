"""Backends that are known by name, installed or not: what a user may have meant, and what installs it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pydantic import Field

from polydraft._registry.engines import KnownEngine, engine_of
from polydraft._registry.tables import core_table
from polydraft.checkpoints._names import did_you_mean
from polydraft.contract.records import BackendRecord, Record

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "KnownBackend",
    "format_engine",
    "format_hint",
    "install_command",
    "known_backends",
    "loaders_of",
    "not_installed_hint",
    "usual_install",
]


class KnownBackend(Record):
    """A backend that polydraft knows by name."""

    name: str
    aliases: tuple[str, ...] = ()
    formats: frozenset[str] = Field(description="Weight formats it loads.")
    modules: tuple[str, ...] = Field(default=(), description="Modules with native code that its engine imports.")

    @property
    def engine(self) -> KnownEngine | None:
        """The engine that brings it; None: this version of polydraft has no backend of that name."""
        return engine_of(self.name)

    @property
    def install(self) -> str:
        """The command that installs it; empty: it cannot be installed on this machine."""
        engine = self.engine
        fits = engine is not None and any(variant.fits for variant in engine.variants)
        return f"polydraft engines install {engine.name}" if engine is not None and fits else ""

    @property
    def why_not(self) -> str:
        """Why it cannot be installed, one sentence; empty if it can."""
        if self.install:
            return ""
        if self.engine is None:
            return f"This version of polydraft has no backend for {self.name}."
        return f"{self.engine.name} has no packages for this platform."


@cache
def known_backends() -> tuple[KnownBackend, ...]:
    """The core's list."""
    return tuple(KnownBackend.model_validate(table) for table in core_table("backend"))


def not_installed_hint(name: str, *, installed: Iterable[str]) -> str:
    """Advice for a backend that is not installed: the command, the right name, or the list."""
    there = sorted(installed)
    for known in known_backends():
        if name.lower() not in {known.name, *known.aliases}:
            continue
        if known.name in there:
            return f"Did you mean {known.name!r}?"
        if known.install:
            return f"Install it: `{known.install}`"
        return f"{known.why_not[:-1]}; {_installed(there)}"
    return did_you_mean(name, [*there, *(known.name for known in known_backends())]) or _capitalized(_installed(there))


def format_hint(form: str, *, but: str = "", installed: Iterable[BackendRecord] = ()) -> str:
    """Which backends load a weight format, other than ``but``, and how to get them; empty if none does."""
    if there := [record.name for record in installed if form in record.formats and record.name != but]:
        usual = [known.name for known in known_backends() if known.name in there]
        return f"Use `backend={(usual or there)[0]!r}`, which does."
    fitting = [known for known in known_backends() if form in known.formats and known.name != but]
    if not fitting:
        return ""
    if install := next((known.install for known in fitting if known.install), ""):
        return f"Install one that does: `{install}`"
    return f"That format is for {' or '.join(known.name for known in fitting)}. {fitting[0].why_not}"


def format_engine(form: str) -> str:
    """The engine that ``format_hint`` names; empty if it names none."""
    fitting = [known for known in known_backends() if form in known.formats and known.install]
    return next((known.engine.name for known in fitting if known.engine is not None), "")


def install_command(record: BackendRecord) -> str:
    """The command that brings the engine of an installed plugin."""
    known = next((known for known in known_backends() if known.name == record.name), None)
    return known.install if known is not None and known.install else record.install_hint


def loaders_of(form: str) -> tuple[str, ...]:
    """The known backends that load a weight format and can be installed."""
    return tuple(known.name for known in known_backends() if known.install and form in known.formats)


def usual_install() -> str:
    """The command that installs the first known backend that can be installed here, as code."""
    return f"`{next(known.install for known in known_backends() if known.install)}`"


def _installed(names: list[str]) -> str:
    return f"installed are: {', '.join(names)}." if names else f"none is installed: {usual_install()}"


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
