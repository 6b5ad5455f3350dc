"""For authors of backends: the whole suite in a few lines, inside their own tests.

    from polydraft_conformance.testing import assert_conforms

    def test_conformance():
        assert_conforms("my-engine")
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["assert_conforms", "run_suite"]


def run_suite(backend: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the suite on an installed backend, in a process of its own.

    Args:
        backend: Its name.
        arguments: Further options of pytest or the suite, such as ``--polydraft-quick``.

    Returns:
        The finished process: ``returncode`` is pytest's, 0 if all is well; ``stdout`` is what it printed.
    """
    command = [
        sys.executable,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "polydraft_conformance"),
        *("--polydraft-backend", backend, *arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def assert_conforms(backend: str, *arguments: str) -> None:
    """Fail, with what the suite printed, unless the backend conforms.

    A backend that cannot run on this machine passes: that is a result. Give ``--polydraft-must-run`` where it must run.

    Args:
        backend: Its name.
        arguments: Further options of pytest or the suite.

    Raises:
        AssertionError: A check failed, or there is no such backend.
    """
    finished = run_suite(backend, *arguments)
    if finished.returncode:
        raise AssertionError(_tail([finished.stdout, finished.stderr], 200))


def _tail(texts: Sequence[str], lines: int) -> str:
    return "\n".join("\n".join(texts).splitlines()[-lines:])
