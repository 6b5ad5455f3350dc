"""Installed versions of distributions, and whether they lie in a range (PEP 440)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = ["VersionLookup", "in_range", "installed_alternative", "installed_version", "older_than"]

VersionLookup = Callable[[str], str | None]
"""From the name of a distribution to its installed version; None if it is not installed."""


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, from its metadata; nothing is imported. None if they are unreadable."""
    try:
        found: str | None = _version(distribution)  # None if its metadata name none
    except (PackageNotFoundError, ValueError, KeyError, OSError):
        return None
    return found and str(found)


def installed_alternative(names: str, lookup: VersionLookup = installed_version) -> tuple[str, str] | None:
    """The first installed one of ``a|b``: its name and version."""
    for name in names.split("|"):
        found = lookup(name.strip())
        if found is not None:
            return name.strip(), found
    return None


def in_range(version: str, specifier: str) -> bool:
    """Whether a version lies in a PEP 440 range, pre-releases and local builds (``0.32.0+cpu``) included.

    A version that is not of PEP 440 lies in no range.

    Raises:
        ValueError: The specifier is not of PEP 440.
    """
    parsed = _parsed(version)
    return parsed is not None and SpecifierSet(specifier).contains(parsed, prereleases=True)


def older_than(version: str, first: str) -> bool:
    """Whether a version is older than ``first``; False if either is not of PEP 440."""
    parsed, limit = _parsed(version), _parsed(first)
    return parsed is not None and limit is not None and parsed < limit


def _parsed(version: str) -> Version | None:
    try:
        return Version(version)
    except InvalidVersion:
        return None
