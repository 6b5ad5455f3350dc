"""For authors of backends: the whole suite in a few lines, inside their own tests.

from polydraft_conformance.testing import assert_conforms

def test_conformance():
    assert_conforms("my-engine")

``GreedySampler(engine)`` drives a stepping engine's primitives in unit tests.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from polydraft.verification import GreedySampler

from polydraft_conformance.running import FinishedRun, run_apart

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polydraft import PluginHost

    from polydraft_conformance.report import Report

__all__ = ["FinishedRun", "GreedySampler", "SuiteRun", "assert_conforms", "run_in_process", "run_suite"]


@dataclass(frozen=True, slots=True)
class SuiteRun:
    """A finished run of the suite inside this process."""

    exit_code: int
    report: Report | None
    """None where no check ran."""

    def rows(self, status: str) -> set[str]:
        """Names of the checks that have a row of this status."""
        return {row.check for row in self.report.rows if row.status == status} if self.report else set()


def run_suite(backend: str, *arguments: str) -> FinishedRun:
    """Run the suite on an installed backend, in a separate process.

    The process takes nothing from this project's pytest settings, conftest.py files and ``PYTEST_ADDOPTS``, nor from
    plugins that change the order of tests: what a backend passes must not depend on where its tests lie.

    Args:
        backend: Its name.
        arguments: Further options of pytest or the suite, such as ``--polydraft-quick``.

    Returns:
        What the process printed, its exit code, the report, and ``reason``: why the run does not prove that the
        backend conforms; empty if it does.
    """
    return run_apart(backend, arguments)


def assert_conforms(backend: str, *arguments: str, allow_unavailable: bool = False) -> None:
    """Fail, with the reason and what the suite printed, unless the backend ran and conforms.

    Args:
        backend: Its name.
        arguments: Further options of pytest or the suite.
        allow_unavailable: Pass, too, where the backend says that it cannot run on this machine. Otherwise that is a
            failure, so that a test cannot succeed by running nothing.

    Warns:
        UserWarning: A whole group of checks does not apply to the models of a pair.

    Raises:
        AssertionError: A check failed, there is no such backend, it cannot run here, or no check passed on any pair:
            options left none, or all were excluded or not claimed.
    """
    finished = run_suite(backend, *arguments)
    for said in finished.left_out:
        warnings.warn(said, stacklevel=2)
    if not finished.reason or (allow_unavailable and not finished.available and not finished.returncode):
        return
    printed = f"{finished.stdout}\n{finished.stderr}".splitlines()[-200:]
    raise AssertionError("\n".join([finished.reason, "", *printed]))


def run_in_process(
    backend: str,
    *arguments: str,
    host: PluginHost | None = None,
    rootdir: Path,
    plugins: Sequence[object] = (),
) -> SuiteRun:
    """Run the suite inside this process: on plugins that are not installed, and with the report as an object.

    Args:
        backend: The backend's name.
        arguments: Further options of pytest or the suite.
        host: Plugins in place of the installed ones.
        rootdir: A folder without pytest settings.
        plugins: Further plugins of pytest.
    """
    observer = _Observer(host)
    command = ["-q", "-c", os.devnull, "--rootdir", str(rootdir), "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    command += ["--pyargs", "polydraft_conformance", "--polydraft-backend", backend, *arguments]
    return SuiteRun(int(pytest.main(command, plugins=[observer, *plugins])), observer.report)


class _Observer:
    """Gives the run its plugins, and keeps its report."""

    def __init__(self, host: PluginHost | None) -> None:
        self.host = host
        self.report: Report | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        from polydraft_conformance.plugin import HOST

        if self.host is not None:
            config.stash[HOST] = self.host

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from polydraft_conformance.plugin import ROWS, SUITE
        from polydraft_conformance.report import report_of

        if SUITE in session.config.stash:
            self.report = report_of(session.config.stash[SUITE], session.config.stash[ROWS])
