"""A command of pip in the words that work on this process's environment, from where polydraft came from."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from polydraft._origin import CORE, Origin, origin, project
from polydraft._program import in_this_environment

__all__ = ["command_here"]

_OWN = re.compile(r"(['\"]?)(polydraft(?:-[a-z0-9-]+)?(?:\[[\w,-]+\])?)\1(\.?)")
"""A requirement of one of polydraft's distributions, quoted or not, at the end of a sentence perhaps."""


def command_here(verb: str, words: Sequence[str]) -> str:
    """The command, with the words that follow ``pip install`` or ``pip uninstall`` as for the package index."""
    start = origin() if verb == "install" else Origin("index")
    done = [*_pip(verb)]
    if done[0] == "uv":
        words = [word for word in words if word != "-y"]  # it does not ask
    if start.kind == "wheels" and any(map(_OWN.fullmatch, words)) and "--find-links" not in words:
        done += ["--find-links", shlex.quote(str(start.folder))]
    for word in words:
        own = _OWN.fullmatch(word)
        done += [word] if own is None else [" ".join(_from(start, Requirement(own[2]))) + own[3]]
    return " ".join(done)


@cache
def _pip(verb: str) -> tuple[str, ...]:
    """The words that run pip, or what stands for it, on this process's environment."""
    if in_this_environment(shutil.which("pip")):
        return "pip", verb
    python = shlex.quote(sys.executable)
    if find_spec("pip") is not None:
        return python, "-m", "pip", verb
    if shutil.which("uv") is not None:
        return "uv", "pip", verb, "--python", python
    # No pip in the environment: that of another one can install into it.
    return "pip", "--python", python, verb


def _from(start: Origin, wanted: Requirement) -> list[str]:
    """The words that name a requirement of polydraft's to pip."""
    if start.kind == "clone" and start.folder is not None:
        projects = _projects(start.folder)
        if canonicalize_name(wanted.name) in projects:
            edit = "-e " if start.editable else ""
            found = [
                f"{edit}{shlex.quote(one)}" if one.startswith(str(start.folder)) else shlex.quote(one)
                for one in _expanded(wanted, projects)
            ]
            return list(dict.fromkeys(found))
    # The normalised name of an extra is the one that pips before 23.3 find.
    extras = ",".join(sorted(map(canonicalize_name, wanted.extras)))
    return [shlex.quote(f"{wanted.name}[{extras}]" if extras else wanted.name)]


def _expanded(wanted: Requirement, projects: Mapping[str, tuple[Path, dict[str, Any]]]) -> Iterator[str]:
    """Folders of a clone, and requirements from elsewhere, that bring a distribution of the clone with its extras."""
    name = canonicalize_name(wanted.name)
    folder, table = projects[name]
    if name == CORE:  # it runs already
        for need in _extras_of_the_core(wanted):
            own = canonicalize_name(need.name) in projects
            yield from _expanded(need, projects) if own else (f"{need.name}{need.specifier}",)
        if not wanted.extras:
            yield str(folder)
        return
    offered = {canonicalize_name(extra): needs for extra, needs in table.get("optional-dependencies", {}).items()}
    further = [need for extra in sorted(wanted.extras) for need in offered.get(canonicalize_name(extra), ())]
    for need in map(Requirement, (*table.get("dependencies", ()), *further)):
        if canonicalize_name(need.name) in projects.keys() - {CORE}:
            yield from _expanded(need, projects)
    yield f"{folder}[{','.join(sorted(wanted.extras))}]" if wanted.extras else str(folder)


def _extras_of_the_core(wanted: Requirement) -> list[Requirement]:
    """What the extras need, as the installed metadata says; nothing if there is none."""
    with suppress(PackageNotFoundError):
        needs = [need for need in map(Requirement, requires(CORE) or ()) if need.marker is not None]
        extras = sorted(map(canonicalize_name, wanted.extras))
        return [need for extra in extras for need in needs if need.marker and need.marker.evaluate({"extra": extra})]
    return []


@cache
def _projects(clone: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Canonical name -> folder and table ``project`` of a clone's distributions."""
    folders = [file.parent for pattern in ("*", "plugins/*") for file in clone.glob(f"{pattern}/pyproject.toml")]
    tables = [(folder, project(folder)) for folder in sorted(folders)]
    return {canonicalize_name(table["name"]): (folder, table) for folder, table in tables if "name" in table}
