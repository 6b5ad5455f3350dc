"""Running one command of an installation: its output goes to a log and to a callback, its failure into an error."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from polydraft._presentable import presentable

__all__ = ["CommandFailedError", "child_environ", "run"]

_KEPT = 400
"""Lines of a command's output that are looked at when it fails."""
_GRACE = 5.0
"""Seconds that an interrupted command has to end by itself."""
_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONSAFEPATH", "__PYVENV_LAUNCHER__")
"""What would let another interpreter import this one's packages."""
_PIPS = ("PIP_TARGET", "PIP_PREFIX", "PIP_PYTHON", "PIP_REQUIREMENT", "PIP_NO_DEPS", "VIRTUAL_ENV", "CONDA_PREFIX")
"""What would lead an installation elsewhere."""


class CommandFailedError(Exception):
    """A command ended with another code than 0; ``output`` has its last lines."""

    def __init__(self, command: Sequence[str], code: int, output: Sequence[str]) -> None:
        super().__init__(f"{command[0]} ended with code {code}")
        self.command, self.code, self.output = tuple(command), code, tuple(output)


def child_environ(python: Path | None = None, **further: str) -> dict[str, str]:
    """The variables for an environment's interpreter: this process's, without what would lead it to other packages.

    Args:
        python: The interpreter; programs next to it come first on the PATH.
        further: Variables to set.
    """
    environ = {name: value for name, value in os.environ.items() if name not in {*_OURS, *_PIPS}}
    if python is not None:
        environ["PATH"] = os.pathsep.join((str(python.parent), environ.get("PATH", os.defpath)))
    return {**environ, "PYTHONNOUSERSITE": "1", **further}


def run(
    command: Sequence[str],
    *,
    log: Path,
    folder: Path,
    environ: Mapping[str, str],
    heard: Callable[[str], None] = lambda line: None,
    given: str = "",
) -> list[str]:
    """Run a command to its end, and return the last lines of its standard output and error.

    It is a process group of its own, which is interrupted, and then killed, if this call is.

    Args:
        command: The program and its arguments.
        log: A file that its output is added to.
        folder: Its working directory.
        environ: All its variables.
        heard: Called with each line of its output.
        given: Its standard input.

    Raises:
        CommandFailedError: It ended with another code than 0.
        OSError: It cannot be started.
    """
    last: deque[str] = deque(maxlen=_KEPT)
    with log.open("a", encoding="utf-8", errors="backslashreplace") as written:
        print(presentable(f"$ {' '.join(command)}"), file=written, flush=True)
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=sys.platform != "win32",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(given)
                process.stdin.close()
            for said in process.stdout:
                line = presentable(said.rstrip())  # without the password of a package index
                print(line, file=written, flush=True)
                if line:
                    last.append(line)
                    heard(line)
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            process.stdout.close()
    if code:
        raise CommandFailedError(command, code, last)
    return list(last)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command and what it has started."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
