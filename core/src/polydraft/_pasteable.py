"""Commands of pip in sentences, in the words that work where they are shown.

Code writes them as for the package index and an activated environment: ``pip install 'polydraft[charts]'``. What is
shown installs the same into this process's environment, from where polydraft came from.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from polydraft._origin import CORE, Origin, origin, project

__all__ = ["pasteable", "with_program"]

_WORD = r"""(?:'[^'`\n]*'|"[^"`\n]*"|[^\s`'",;()&|]+)"""
_COMMAND = re.compile(rf"(?<!-m )(?<!uv )(?<![\w./-])pip (install|uninstall)((?: {_WORD})+)")
"""A command of pip in a sentence; one that names its environment is another process's own, and is left alone."""
_OWN = re.compile(r"(['\"]?)(polydraft(?:-[a-z0-9-]+)?(?:\[[\w,-]+\])?)\1(\.?)")
"""A requirement of one of polydraft's distributions, quoted or not, at the end of a sentence perhaps."""


def pasteable(text: str) -> str:
    """The text, with what pip is told to install in the words that work here."""
    return _COMMAND.sub(_here, text) if "pip " in text else text


def with_program(text: str) -> str:
    """The text, with polydraft's own commands in code as they work from a shell; for the command line alone.

    An error in Python may come from an engine's environment, whose program is not the user's.
    """
    return text.replace("`polydraft ", f"`{_program()} ") if "`polydraft " in text else text


@cache
def _program() -> str:
    if _in_this_environment(shutil.which("polydraft")):
        return "polydraft"
    beside = Path(sys.executable).with_name("polydraft")
    python = shlex.quote(sys.executable)
    return shlex.quote(str(beside)) if beside.is_file() else f"{python} -m polydraft"


def _in_this_environment(program: str | None) -> bool:
    return program is not None and Path(program).parent.resolve() == Path(sys.executable).parent.resolve()


def _here(found: re.Match[str]) -> str:
    verb, words = found[1], re.findall(_WORD, found[2])
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
    if _in_this_environment(shutil.which("pip")):
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
