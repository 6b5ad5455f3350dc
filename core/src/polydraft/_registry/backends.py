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

__all__ = ["KnownBackend", "known_backends", "not_installed_hint"]


class KnownBackend(Record):
    """A backend that polydraft has heard of."""

    name: str
    aliases: tuple[str, ...] = ()
    formats: frozenset[str] = Field(description="Weight formats it loads.")
    install: str = Field(default="", description="The command that installs it; empty: there is none in this version.")


@cache
def known_backends() -> tuple[KnownBackend, ...]:
    """The core's list."""
    return tuple(KnownBackend.model_validate(table) for table in core_table("backend"))


def not_installed_hint(name: str, *, installed: Iterable[str]) -> str:
    """What to do where a backend of that name is not installed: the command, the right name, or the list."""
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


def _installed(names: list[str]) -> str:
    return (
        f"installed are: {', '.join(names)}." if names else "none is installed: pip install 'polydraft[transformers]'"
    )


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
