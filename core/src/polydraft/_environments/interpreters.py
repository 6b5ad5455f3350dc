"""The Python that an environment is made with: this one, else another of this machine that the engine runs with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

from polydraft._environments.runner import child_environ
from polydraft.contract.records import Record
from polydraft.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from polydraft._registry.engines import KnownEngine

__all__ = ["Interpreter", "interpreter_for"]

_TIMEOUT = 20.0
_TELLS = (
    "import json, sys, sysconfig; print(json.dumps(['.'.join(map(str, sys.version_info[:3])), sys.implementation.name, "
    "bool(sysconfig.get_config_var('Py_GIL_DISABLED'))]))"
)


class Interpreter(Record):
    """A Python to make an environment with."""

    program: str
    """Its path; or a version, which uv finds or downloads."""
    version: str
    note: str = ""
    """Why it is another one than this process's."""


def interpreter_for(engine: KnownEngine, wanted: str | None, uv: str | None) -> Interpreter:
    """Find the Python for an engine.

    Args:
        engine: The engine.
        wanted: A path, a name on the PATH or a version such as ``3.12``; None: this process's if it fits, else the
            newest that does.
        uv: The program uv, which can download one; None: it is not installed.

    Raises:
        EnvironmentSetupError: There is none that fits.
    """
    range_ = SpecifierSet(engine.python)
    minors = [f"3.{minor}" for minor in range(30, 8, -1) if range_.contains(f"3.{minor}.99")]
    if wanted is not None:
        return _named(engine, wanted, range_, uv)
    here = ".".join(map(str, sys.version_info[:3]))
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if sys.executable and range_.contains(here) and sys.implementation.name == "cpython" and not free_threaded:
        return Interpreter(program=sys.executable, version=here)
    kind = "free-threaded" if free_threaded else "" if sys.implementation.name == "cpython" else sys.implementation.name
    running = f"{kind} Python {here}".strip()
    why = f"{engine.name} has no packages for {running}"
    for minor in minors:
        program = shutil.which(f"python{minor}")
        if program and (found := _look(program)) and range_.contains(found):
            return Interpreter(program=program, version=found, note=f"{why}: {program} is used.")
    if uv is not None:
        return Interpreter(
            program=minors[0], version=minors[0], note=f"{why}: uv finds or downloads Python {minors[0]}."
        )
    raise EnvironmentSetupError(
        f"{why}, and no other Python is on the PATH.",
        f"Install Python {minors[0]}, or uv (https://docs.astral.sh/uv), which downloads one, and run "
        f"`polydraft engines install {engine.name}` again.",
    )


def _named(engine: KnownEngine, wanted: str, range_: SpecifierSet, uv: str | None) -> Interpreter:
    is_path = os.sep in wanted or "/" in wanted
    program = str(Path(wanted).expanduser().absolute()) if is_path else shutil.which(wanted)
    if program is None and wanted[:1].isdigit():
        program = shutil.which(f"python{wanted}")
        if program is None and uv is not None and range_.contains(f"{wanted}.99" if wanted.count(".") == 1 else wanted):
            return Interpreter(program=wanted, version=wanted)
    found = _look(program) if program else ""
    if not program or not found:
        raise EnvironmentSetupError(
            f"{wanted} is not a CPython that runs here.", "Give `--python` a path, or a version such as 3.12."
        )
    if not range_.contains(found):
        raise EnvironmentSetupError(
            f"{engine.name} has no packages for Python {found} ({program}).", f"It has some for Python {engine.python}."
        )
    return Interpreter(program=program, version=found)


def _look(program: str) -> str:
    """The version of an ordinary CPython; empty for everything else."""
    try:
        told = subprocess.run(
            [program, "-I", "-c", _TELLS], capture_output=True, timeout=_TIMEOUT, check=True, env=child_environ()
        )
        version, implementation, free_threaded = json.loads(told.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return str(version) if implementation == "cpython" and not free_threaded else ""
