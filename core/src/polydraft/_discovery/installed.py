"""The plugins that are installed: entry points of the group ``polydraft``, read without importing anything."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions
from typing import Any, Literal

from packaging.utils import canonicalize_name

from polydraft._containment import described
from polydraft.contract.hookspecs import ENTRY_POINT_GROUP
from polydraft.contract.records import Record

__all__ = ["Found", "PluginStatus", "installed_plugins", "plugin_modules"]


class PluginStatus(Record):
    """One plugin that was found, and whether it is used."""

    name: str
    distribution: str | None = None
    version: str | None = None
    state: Literal["loaded", "disabled", "broken"] = "loaded"
    reason: str = ""
    backends: tuple[str, ...] = ()
    environment: str = ""
    """The engine whose environment it is installed in; empty: this process's own."""


Found = tuple[PluginStatus, Callable[[], Any]]
"""A plugin before it is imported, with what imports it."""


def installed_plugins() -> tuple[list[Found], list[str]]:
    """The entry points of the group, and notes on packages whose entry points cannot be read.

    One package after the other, which ``importlib.metadata.entry_points`` does not: one malformed file ends it.
    """
    found: list[Found] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    for package in distributions():
        try:
            text = package.read_text("entry_points.txt")
        except Exception as error:  # not UTF-8, for example: whether it has a plugin is not known
            unreadable.append(f"The entry points of {_title(package)} cannot be read: {described(error)}.")
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
            broken = {"state": "broken", "reason": f"Its entry_points.txt cannot be read: {described(error)}."}
            found.append((status.model_copy(update=broken), dict))
    return found, unreadable


def plugin_modules() -> list[str]:
    """The top-level modules of the installed plugins, which are not imported."""
    points = [getattr(load, "__self__", None) for _, load in installed_plugins()[0]]
    return sorted({point.module.partition(".")[0] for point in points if isinstance(point, EntryPoint)})


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
