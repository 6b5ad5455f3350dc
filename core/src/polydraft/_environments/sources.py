"""Where polydraft and its plugins are installed from: a clone, a folder of wheels, or the package index."""

from __future__ import annotations

import hashlib
import json
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from polydraft._environments.records import Environment, Source
from polydraft._registry.engines import known_engines
from polydraft.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from polydraft._registry.engines import KnownEngine

__all__ = ["code_stamp", "given_source", "own_source", "requirements", "stamp"]

_CORE, _CORE_FOLDER = "polydraft", "core"
_PAIRS, _PAIRS_FOLDER = "polydraft-builtin-pairs", "builtin_pairs"
_OWN = "polydraft-"
"""Names of polydraft's own distributions begin so; all have the core's version."""


def own_source(engine: KnownEngine) -> Source:
    """Where the running polydraft came from, if the engine's plugin is there, too; else the index."""
    import polydraft

    # core/src/polydraft/__init__.py of a clone: installed editable, or on the path.
    folder = Path(polydraft.__file__).resolve().parents[3]
    if _is_clone(folder) and (folder / engine.folder / "pyproject.toml").is_file():
        return Source(kind="clone", folder=folder, editable=True)
    with suppress(PackageNotFoundError, OSError, ValueError, TypeError):
        # PEP 610: `pip install ./core`, or a wheel's file.
        origin: dict[str, Any] = json.loads(distribution(_CORE).read_text("direct_url.json") or "{}")
        url = urlsplit(str(origin.get("url", "")))
        if url.scheme == "file":
            parent = Path(url2pathname(url.path)).parent
            if "dir_info" in origin and _is_clone(parent) and _version_of(parent / _CORE_FOLDER) == version(_CORE):
                return Source(kind="clone", folder=parent)
            if "archive_info" in origin and engine.distribution and _wheel(parent, engine.distribution):
                return Source(kind="wheels", folder=parent)
    return Source(kind="index")


def given_source(text: str) -> Source:
    """The source that a user names: a folder, or ``index``.

    Raises:
        EnvironmentSetupError: It is neither a clone nor a folder of wheels.
    """
    if text == "index":
        return Source(kind="index")
    folder = Path(text).expanduser().absolute()
    if _is_clone(folder):
        return Source(kind="clone", folder=folder)
    if any(folder.glob("*.whl")):
        return Source(kind="wheels", folder=folder)
    what = "holds neither a clone of polydraft nor wheels" if folder.is_dir() else "is not a folder"
    raise EnvironmentSetupError(
        f"{folder} {what}.", "Name a clone of polydraft, a folder of wheels (`nox -s dist` makes one), or `index`."
    )


def requirements(source: Source, engine: KnownEngine, packages: tuple[str, ...]) -> list[str]:
    """What installs polydraft, the plugin and the built-in pairs, as arguments of pip and uv.

    Args:
        source: Where from.
        engine: The engine.
        packages: Requirements that bring the plugin in place of the engine's own distribution.

    Raises:
        EnvironmentSetupError: The source does not have one of them, or has another version than the one that runs.
    """
    given, packages = packages, (*packages, *_structured())
    wanted = [(_CORE, _CORE_FOLDER), (_PAIRS, _PAIRS_FOLDER)]
    if not given:
        wanted[1:1] = [*engine.also.items(), (engine.distribution, engine.folder)]
    if source.kind == "index":
        return [*(f"{name}=={version(_CORE)}" for name, _ in wanted), *packages]
    find = _from_clone if source.kind == "clone" else _from_wheels
    return [*(word for name, folder in wanted for word in find(source, name, folder)), *packages]


def _structured() -> list[str]:
    """What outputs that must match need, where the engine has no way of its own: the extra ``structured``."""
    needed = map(Requirement, requires(_CORE) or ())
    return [f"{one.name}{one.specifier}" for one in needed if one.marker and 'extra == "structured"' in str(one.marker)]


def _from_clone(source: Source, name: str, folder: str) -> list[str]:
    assert source.folder is not None
    path = source.folder / folder
    found = _version_of(path)
    if not found:
        raise EnvironmentSetupError(
            f"The clone {source.folder} has no {folder}.", "Name another one, or a folder of wheels, with `--from`."
        )
    if found != version(_CORE):
        raise EnvironmentSetupError(
            f"The clone {source.folder} has version {found} of {name}, and polydraft {version(_CORE)} runs here.",
            f"Install that version here first: pip install {source.folder / _CORE_FOLDER}",
        )
    return ["-e", str(path)] if source.editable else [str(path)]


def _from_wheels(source: Source, name: str, folder: str) -> list[str]:
    assert source.folder is not None
    wheel = _wheel(source.folder, name)
    if wheel is None:
        raise EnvironmentSetupError(
            f"{source.folder} holds no wheel of {name} {version(_CORE)}.",
            "In a clone of that version, `nox -s dist` makes all wheels in dist/; name that folder with `--from`.",
        )
    return [f"{name} @ {wheel.as_uri()}"]


def stamp(source: Source, engine: KnownEngine) -> str:
    """Changes when the files change that an environment has copies of; empty: it has none, or they are not known."""
    if source.folder is None or source.editable:
        return ""
    if source.kind == "clone":
        return _digest(_code(source.folder, engine))
    wheels = (_wheel(source.folder, name) for name in (_CORE, *engine.also, engine.distribution) if name)
    return _digest([wheel for wheel in wheels if wheel is not None])


def code_stamp(environment: Environment) -> str:
    """Changes when the code changes that an environment uses where it lies; empty: it has copies."""
    source, engine = environment.source, known_engines().get(environment.name)
    if source.folder is None or not source.editable:
        return ""
    return _digest(_code(source.folder, engine))


def _code(clone: Path, engine: KnownEngine | None) -> list[Path]:
    own = (*engine.also.values(), engine.folder) if engine is not None else ()
    folders = [clone / name / "src" for name in (_CORE_FOLDER, *own) if name]
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix != ".pyc"]


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    with suppress(OSError):  # it changes at the moment
        for file in files:
            if file.is_file():
                status = file.stat()
                found.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
        return found.hexdigest()[:16]
    return ""


def _is_clone(folder: Path) -> bool:
    return _project(folder / _CORE_FOLDER).get("name") == _CORE


def _version_of(folder: Path) -> str:
    """The version of a distribution's folder; empty if there is none."""
    return str(_project(folder).get("version", ""))


def _project(folder: Path) -> dict[str, Any]:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return {}
    return project if isinstance(project, dict) else {}


def _wheel(folder: Path, name: str) -> Path | None:
    """The wheel of one of polydraft's distributions, in the version that runs."""
    for path in sorted(folder.glob("*.whl")):
        with suppress(InvalidWheelFilename):
            found, number, _, _ = parse_wheel_filename(path.name)
            if found == canonicalize_name(name) and str(number) == version(_CORE):
                return path
    return None
