"""Where the running polydraft came from: a clone, a folder of wheels, or the package index."""

from __future__ import annotations

import json
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

__all__ = ["CORE", "CORE_FOLDER", "Origin", "is_clone", "origin", "project", "wheel_of"]

CORE, CORE_FOLDER = "polydraft", "core"
"""The core's distribution, and its folder in a clone. All of polydraft's distributions have its version."""


@dataclass(frozen=True)
class Origin:
    """Where it came from."""

    kind: Literal["clone", "wheels", "index"]
    folder: Path | None = None
    """The clone, or the folder of wheels."""
    editable: bool = False
    """Whether a clone's code is used where it lies."""


@cache
def origin() -> Origin:
    """That of this process's polydraft. What pip took from ``--find-links`` counts as the index: it leaves no trace."""
    # core/src/polydraft/_origin.py of a clone: installed editable, or on the path.
    folder = Path(__file__).resolve().parents[3]
    if is_clone(folder):
        return Origin("clone", folder, editable=True)
    with suppress(PackageNotFoundError, OSError, ValueError, TypeError):
        # PEP 610: `pip install ./core`, or a wheel's file.
        found: dict[str, Any] = json.loads(distribution(CORE).read_text("direct_url.json") or "{}")
        url = urlsplit(str(found.get("url", "")))
        if url.scheme == "file":
            from urllib.request import url2pathname  # and with it the HTTP client

            parent = Path(url2pathname(url.path)).parent
            if "dir_info" in found and is_clone(parent) and _version_of(parent / CORE_FOLDER) == version(CORE):
                return Origin("clone", parent)
            if "archive_info" in found and parent.is_dir():
                return Origin("wheels", parent)
    return Origin("index")


def is_clone(folder: Path) -> bool:
    """Whether a folder is a clone of polydraft."""
    return bool(project(folder / CORE_FOLDER).get("name") == CORE)


def project(folder: Path) -> dict[str, Any]:
    """The table ``project`` of a folder's pyproject.toml; empty if there is none."""
    try:
        found = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def wheel_of(folder: Path, name: str) -> Path | None:
    """The wheel of one of polydraft's distributions, in the version that runs."""
    for path in sorted(folder.glob("*.whl")):
        with suppress(InvalidWheelFilename):
            found, number, _, _ = parse_wheel_filename(path.name)
            if found == canonicalize_name(name) and str(number) == version(CORE):
                return path
    return None


def _version_of(folder: Path) -> str:
    return str(project(folder).get("version", ""))
