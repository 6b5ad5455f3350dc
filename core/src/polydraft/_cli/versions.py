"""What ``polydraft --version`` says: read from the metadata of what is installed; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from polydraft._registry.versions import installed_version

__all__ = ["version_lines"]


def version_lines() -> list[str]:
    """polydraft's version, then a line for each engine: here, and in environments of their own."""
    from polydraft._discovery.installed import installed_plugins
    from polydraft._environments.store import environments
    from polydraft._registry.engines import known_engines
    from polydraft._registry.faults import distributions

    lines = [f"polydraft {version('polydraft')}"]
    engines = known_engines()
    common = {*_needs("polydraft"), "polydraft"}
    for status, _ in installed_plugins()[0]:
        if status.distribution and status.state == "loaded":
            needs = [name for name in _needs(status.distribution, extras=status.name in engines) if name not in common]
            lines.append(f"{status.name}: {_versions([status.distribution, *needs])}")
    for name, found in sorted(environments().items()):
        wanted = dict.fromkeys(each for record in found.backends.values() for each in distributions(record))
        there = ", ".join(f"{each} {found.versions[each]}" for each in wanted if each in found.versions)
        lines.append(f"{name}, in an environment of its own: {there}")
    return lines


def _needs(distribution: str, *, extras: bool = True) -> list[str]:
    """Canonical names of what a distribution requires."""
    found = []
    try:
        wanted = requires(distribution) or ()
    except (PackageNotFoundError, ValueError):
        wanted = ()
    for text in wanted:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if extras or "extra" not in str(requirement.marker or ""):
            found.append(canonicalize_name(requirement.name))
    return list(dict.fromkeys(found))


def _versions(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {found}" for name in names if (found := installed_version(name)))
