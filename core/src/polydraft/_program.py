"""polydraft's own commands in sentences, as they work from the user's shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

__all__ = ["in_this_environment", "with_program"]


def with_program(text: str) -> str:
    """The text, with polydraft's own commands in code as they work from a shell; for the command line alone.

    An error in Python may come from an engine's environment, whose program is not the user's.
    """
    return text.replace("`polydraft ", f"`{_program()} ") if "`polydraft " in text else text


@cache
def _program() -> str:
    if in_this_environment(shutil.which("polydraft")):
        return "polydraft"
    beside = Path(sys.executable).with_name("polydraft")
    python = shlex.quote(sys.executable)
    return shlex.quote(str(beside)) if beside.is_file() else f"{python} -m polydraft"


def in_this_environment(program: str | None) -> bool:
    """Whether a program of the path, if there is one, lies beside this process's interpreter."""
    return program is not None and Path(program).parent.resolve() == Path(sys.executable).parent.resolve()
