"""How to start a Python that imports polydraft: this program's own interpreter, or that of another environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["command_of", "environment_of", "is_own", "own_python"]

# alter_sys: pydantic looks for the module of a record in ``sys.modules``.
_START = (
    "import sys, runpy; sys.path[:] = sys.argv.pop().split({0!r}); "
    "runpy.run_module({1!r}, run_name='__main__', alter_sys=True)"
)
_SEPARATOR = "\n"
_FOREIGN = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONPYCACHEPREFIX", "__PYVENV_LAUNCHER__", "VIRTUAL_ENV")
"""Variables with which this program's packages would be imported in another environment."""


def own_python() -> Path | None:
    """The interpreter that can start this program's modules in another process; None if there is none.

    An app that embeds Python names one with ``multiprocessing.set_executable``; a frozen one has none.
    """
    from multiprocessing import spawn

    python = os.fsdecode(spawn.get_executable() or "")
    if not python or (getattr(sys, "frozen", False) and python == sys.executable):
        return None
    return Path(python)


def is_own(python: Path) -> bool:
    """Whether an interpreter is this program's own. Links count: environments link to one and the same program."""
    return python == own_python()


def command_of(python: Path, module: str, *arguments: str) -> list[str]:
    """The command that runs a module of polydraft, with arguments in ``sys.argv[1:]``.

    This program's own interpreter gets its ``sys.path``, as it is now. Another one imports from its own environment
    only: neither from the working directory, nor from PYTHONPATH, nor from the user's packages.
    """
    if not is_own(python):
        return [str(python), "-I", "-m", module, *arguments]
    # -P: what is imported before the path is set must not come from the working directory.
    start = _START.format(_SEPARATOR, module)
    return [str(python), "-P", "-c", start, *arguments, _SEPARATOR.join(map(str, sys.path))]


def environment_of(python: Path) -> dict[str, str]:
    """The environment variables that it is started with."""
    own = is_own(python)
    return {name: value for name, value in os.environ.items() if own or name not in _FOREIGN}
