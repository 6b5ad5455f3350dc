"""Runs requests where a backend cannot see that the suite is there: in a process without pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft import default_host

from polydraft_conformance.signals import LeftOut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polydraft_conformance.suite import Suite

__all__ = ["outputs_elsewhere"]

_SCRIPT = Path(__file__).with_name("plain_process.py")
_MODULES = ("pytest", "_pytest", "polydraft_conformance", "xdist", "execnet")
_VARIABLES = ("PYTEST", "POLYDRAFT_CONFORMANCE", "NOX", "TOX", "COV_", "GITHUB_")


def outputs_elsewhere(
    suite: Suite, load: dict[str, Any], requests: list[dict[str, Any]], *, time_limit: float
) -> list[dict[str, Any]]:
    """What ``plain_process.main`` returns, from a new process without pytest.

    Plugins that are not installed exist in this process only. They are run in a thread of it, from whose stack,
    modules, arguments and environment pytest and the suite have gone meanwhile.

    Args:
        suite: The run.
        load: JSON-ready arguments of ``polydraft.load``.
        requests: JSON-ready arguments of ``Session.generate``.
        time_limit: Of the process, in seconds.

    Raises:
        AssertionError: The program fails there.
    """
    if suite.options.one_session:
        raise LeftOut("It loads the pair in another process, and `--polydraft-one-session` was given.")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "app.py")
        script.write_text(_SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
        if suite.host is not default_host():
            return _in_thread(script, load, requests, suite.host)
        asked, answered = Path(folder, "in.json"), Path(folder, "out.json")
        asked.write_text(json.dumps({"load": load, "requests": requests}), encoding="utf-8")
        finished = subprocess.run(
            [sys.executable, str(script), str(asked), str(answered)],
            env=_usual_environment(),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=time_limit,
            check=False,
        )
        if finished.returncode:
            raise AssertionError(
                "The backend fails in a process without pytest: "
                f"{(finished.stderr.strip().splitlines() or ['no message'])[-1]}\n{finished.stderr[-2000:]}"
            )
        outputs: list[dict[str, Any]] = json.loads(answered.read_text(encoding="utf-8"))
        return outputs


def _usual_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_VARIABLES) and name != "CI"}


def _in_thread(script: Path, load: dict[str, Any], requests: list[dict[str, Any]], host: Any) -> list[dict[str, Any]]:
    outputs: list[list[dict[str, Any]]] = []
    errors: list[Exception] = []
    # Compiled here: importing it would need the suite's package.
    program = compile(script.read_text(encoding="utf-8"), str(script), "exec", dont_inherit=True)

    def run() -> None:
        names: dict[str, Any] = {"__name__": "app"}
        try:
            exec(program, names)
            outputs.append(names["main"](load, requests, host=host))
        except Exception as error:
            errors.append(error)

    # Without a function of the suite in its stack: the thread's own ``run`` calls it through its code object only.
    run.__code__ = run.__code__.replace(co_filename=str(script))
    with _unseen():
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join()
    if errors:
        error = errors[0]
        raise AssertionError(f"The backend fails without pytest: {type(error).__name__}: {error}") from error
    return outputs[0]


@contextmanager
def _unseen() -> Iterator[None]:
    """Take pytest and the suite out of this process's modules, arguments and environment."""
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _MODULES}
    arguments, environment = sys.argv, dict(os.environ)
    usual = _usual_environment()
    try:
        for name in modules:
            del sys.modules[name]
        for name in environment.keys() - usual.keys():
            del os.environ[name]
        sys.argv = ["app.py"]
        yield
    finally:
        sys.argv = arguments
        os.environ.update(environment)
        sys.modules.update(modules)
