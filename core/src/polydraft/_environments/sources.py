"""Where polydraft and its plugins are installed from: a clone, a folder of wheels, or the package index."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.metadata import requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from polydraft._environments.records import Environment, Source
from polydraft._origin import CORE, CORE_FOLDER, is_clone, origin, project, wheel_of
from polydraft._registry.engines import known_engines
from polydraft.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from polydraft._registry.engines import KnownEngine

__all__ = ["code_stamp", "given_source", "own_distributions", "own_source", "requirements", "stamp"]

_PAIRS, _PAIRS_FOLDER = "polydraft-builtin-pairs", "builtin_pairs"
_OWN = "polydraft-"
"""Names of polydraft's own distributions begin so; all have the core's version."""


def own_source(engine: KnownEngine) -> Source:
    """Where the running polydraft came from, if the engine's plugin is there, too; else the index."""
    found = origin()
    if found.folder is not None and (
        (found.folder / engine.folder / "pyproject.toml").is_file()
        if found.kind == "clone"
        else engine.distribution and wheel_of(found.folder, engine.distribution)
    ):
        return Source(kind=found.kind, folder=found.folder, editable=found.editable)
    return Source(kind="index")


def own_distributions() -> set[str]:
    """polydraft's own distributions, which a clone and a folder of its wheels hold."""
    engines = known_engines().values()
    return {CORE, _PAIRS, *(name for engine in engines for name in (engine.distribution, *engine.also))}


def given_source(text: str) -> Source:
    """The source that a user names: a folder, or ``index``.

    Raises:
        EnvironmentSetupError: It is neither a clone nor a folder of wheels.
    """
    if text == "index":
        return Source(kind="index")
    folder = Path(text).expanduser().absolute()
    if is_clone(folder):
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
    wanted = [(CORE, CORE_FOLDER), (_PAIRS, _PAIRS_FOLDER)]
    if not given:
        wanted[1:1] = [*engine.also.items(), (engine.distribution, engine.folder)]
    if source.kind == "index":
        return [*(f"{name}=={version(CORE)}" for name, _ in wanted), *packages]
    find = _from_clone if source.kind == "clone" else _from_wheels
    return [*(word for name, folder in wanted for word in find(source, name, folder)), *packages]


def _structured() -> list[str]:
    """What outputs that must match need, where the engine has no way of its own: the extra ``structured``."""
    needed = map(Requirement, requires(CORE) or ())
    return [f"{one.name}{one.specifier}" for one in needed if one.marker and 'extra == "structured"' in str(one.marker)]


def _from_clone(source: Source, name: str, folder: str) -> list[str]:
    assert source.folder is not None
    path = source.folder / folder
    found = _version_of(path)
    if not found:
        raise EnvironmentSetupError(
            f"The clone {source.folder} has no {folder}.", "Name another one, or a folder of wheels, with `--from`."
        )
    if found != version(CORE):
        raise EnvironmentSetupError(
            f"The clone {source.folder} has version {found} of {name}, and polydraft {version(CORE)} runs here.",
            f"Install that version here first: pip install {source.folder / CORE_FOLDER}",
        )
    return ["-e", str(path)] if source.editable else [str(path)]


def _from_wheels(source: Source, name: str, folder: str) -> list[str]:
    assert source.folder is not None
    wheel = wheel_of(source.folder, name)
    if wheel is None:
        raise EnvironmentSetupError(
            f"{source.folder} holds no wheel of {name} {version(CORE)}.",
            "In a clone of that version, `nox -s dist` makes all wheels in dist/; name that folder with `--from`.",
        )
    return [f"{name} @ {wheel.as_uri()}"]


def stamp(source: Source, engine: KnownEngine) -> str:
    """Changes when the files change that an environment has copies of; empty: it has none, or they are not known."""
    if source.folder is None or source.editable:
        return ""
    if source.kind == "clone":
        return _digest(_code(source.folder, engine))
    wheels = (wheel_of(source.folder, name) for name in (CORE, *engine.also, engine.distribution) if name)
    return _digest([wheel for wheel in wheels if wheel is not None])


def code_stamp(environment: Environment) -> str:
    """Changes when the code changes that an environment uses where it lies; empty: it has copies."""
    source, engine = environment.source, known_engines().get(environment.name)
    if source.folder is None or not source.editable:
        return ""
    return _digest(_code(source.folder, engine))


def _code(clone: Path, engine: KnownEngine | None) -> list[Path]:
    own = (*engine.also.values(), engine.folder) if engine is not None else ()
    folders = [clone / name / "src" for name in (CORE_FOLDER, *own) if name]
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


def _version_of(folder: Path) -> str:
    """The version of a distribution's folder; empty if there is none."""
    return str(project(folder).get("version", ""))
