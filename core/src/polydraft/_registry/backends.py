"""Backends that are known by name, installed or not: what a user may have meant, and what installs it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pydantic import Field

from polydraft._registry.tables import core_table
from polydraft.checkpoints._names import did_you_mean
from polydraft.contract.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["KnownBackend", "format_hint", "known_backends", "not_installed_hint", "usual_install"]


class KnownBackend(Record):
    """A backend that polydraft knows by name."""

    name: str
    aliases: tuple[str, ...] = ()
    formats: frozenset[str] = Field(description="Weight formats it loads.")
    modules: tuple[str, ...] = Field(default=(), description="Modules with native code that its engine imports.")
    install: str = Field(default="", description="The command that installs it; empty: not available in this version.")


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
            return f"Install it: {known.install}"
        return f"This version of polydraft has no backend for {known.name}; {_installed(there)}"
    return did_you_mean(name, [*there, *(known.name for known in known_backends())]) or _capitalized(_installed(there))


def format_hint(form: str, *, but: str = "") -> str:
    """Which known backends load a weight format, other than ``but``, and how to get them; empty if none does."""
    fitting = [known for known in known_backends() if form in known.formats and known.name != but]
    if not fitting:
        return ""
    if install := next((known.install for known in fitting if known.install), ""):
        return f"Install one that does: {install}"
    names = " or ".join(known.name for known in fitting)
    return f"That format is for {names}, for which this version of polydraft has no backend."


def usual_install() -> str:
    """The command that installs the first known backend."""
    return next(known.install for known in known_backends() if known.install)


def _installed(names: list[str]) -> str:
    return f"installed are: {', '.join(names)}." if names else f"none is installed: {usual_install()}"


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
