"""A run of the suite in a process of its own, and whether it proves anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft_conformance.report import JSON_NAME
from polydraft_conformance.suitability import said_of_models

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FinishedRun", "run_apart"]

_ALONE = (
    # What the author's project and shell set is for the author's own tests.
    *("-c", os.devnull, "--noconftest", "-p", "no:cacheprovider"),
    # By name, as plugins are not loaded by themselves where PYTEST_DISABLE_PLUGIN_AUTOLOAD is set.
    *("-p", "polydraft_conformance"),
    # Checks run in the order in which they build upon one another, and pair by pair.
    *("-p", "no:randomly", "-p", "no:random_order", "-p", "no:reverse", "-p", "no:rerunfailures", "-p", "no:flaky"),
)
_DROPPED = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST")
_CODES = {
    2: "The run was interrupted.",
    3: "pytest, or one of its plugins, failed.",
    5: "No check was left to run: an option such as `-k` or `-m` left out all of them.",
}


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A finished run of the suite.

    ``returncode``, ``stdout`` and ``stderr`` are those of its process: pytest's exit code, 0 if nothing failed.
    """

    backend: str
    returncode: int
    stdout: str
    stderr: str
    report: Mapping[str, Any] | None
    """The JSON report; None where no check ran."""

    @property
    def available(self) -> bool:
        """Whether the backend can run on this machine, as far as the run came."""
        return self.report is None or bool(self.report["availability"]["usable"])

    @property
    def left_out(self) -> list[str]:
        """Groups of checks that prove nothing on the models of a pair, one sentence each."""
        return said_of_models(self.report["checks"]) if self.report else []

    @property
    def reason(self) -> str:
        """Why the run does not prove that the backend conforms, in a sentence or two; empty if it does.

        It does if nothing failed, and checks passed on at least one pair of this backend.
        """
        return self._failure() or self._nothing_proven()

    def _failure(self) -> str:
        if self.report is None:
            return self._why_no_report()
        named = self.report["backend"]["name"]
        if named != self.backend:
            return f"The suite ran on the backend {named!r}, not on {self.backend!r}: an argument names another one."
        failed = [row for row in self.report["checks"] if row["status"] == "fail"]
        if failed:
            first = failed[0]
            case = ", ".join(str(first[name]) for name in ("target", "kind") if first[name])
            where = f" ({case}, k={first['k']})" if case else ""
            said = (first["reason"].splitlines() or ["no reason is known"])[0]
            count = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
            return (
                f"{count} of {self.backend} failed, first {first['check']}{where}: {said} "
                f"(`polydraft-conformance explain {first['check']}` says where to look.)"
            )
        if self.returncode:
            return _CODES.get(self.returncode, f"The run ended with the exit code {self.returncode}.")
        return ""

    def _why_no_report(self) -> str:
        if self.returncode == 0:
            return "No check ran: an option made pytest do something else, such as to list tests."
        if self.returncode < 0:
            return f"The process was ended by signal {-self.returncode} before a check had ended."
        told = [line.removeprefix("ERROR: ") for line in self.stderr.splitlines() if line.startswith("ERROR: ")]
        return told[0] if told else _CODES.get(self.returncode, "The suite could not be started.")

    def _nothing_proven(self) -> str:
        assert self.report is not None
        if not self.available:
            said = self.report["availability"]
            return f"{self.backend} cannot run on this machine: {said['reason']} {said['remedy']}".rstrip()
        rows = self.report["checks"]
        on_pairs = [row for row in rows if row["target"]]
        if any(row["status"] == "pass" for row in on_pairs):
            return ""
        if not on_pairs:
            return (
                f"{self.backend} was run on no pair: an option such as `-k` left only checks that load nothing "
                f"({', '.join(sorted({row['check'] for row in rows}))})."
            )
        counts = Counter(row["status"] for row in on_pairs)
        said = ", ".join(f"{count} {status}" for status, count in counts.most_common())
        reasons = Counter(row["reason"].splitlines()[0] for row in on_pairs if row["reason"])
        most = reasons.most_common(1)
        return f"No check passed on any pair of {self.backend}: {said}. {most[0][0] if most else ''}".rstrip()


def run_apart(backend: str, arguments: tuple[str, ...]) -> FinishedRun:
    """Run the suite on an installed backend, in a process that no pytest setting of this project reaches.

    Args:
        backend: Its name.
        arguments: Further options of pytest or the suite. Paths are relative to the current folder.
    """
    with tempfile.TemporaryDirectory(prefix="polydraft-conformance-") as empty:
        folder = _report_folder(arguments)
        # Of an option that is given twice, the last one counts.
        command = [
            *(sys.executable, "-m", "pytest", "-q", *_ALONE, "--rootdir", empty),
            *("--pyargs", "polydraft_conformance", "--polydraft-backend", backend),
            *(() if folder else ("--polydraft-report", empty)),
            *arguments,
        ]
        environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
        file = (folder or Path(empty)) / JSON_NAME
        file.unlink(missing_ok=True)  # of an earlier run
        finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return FinishedRun(backend, finished.returncode, finished.stdout, finished.stderr, report)


def _report_folder(arguments: tuple[str, ...]) -> Path | None:
    """Where the caller wants the report."""
    name, given = "--polydraft-report", list(arguments)
    found = None
    for index, argument in enumerate(given):
        if argument == name:
            found = Path(*given[index + 1 : index + 2])
        elif argument.startswith(f"{name}="):
            found = Path(argument.removeprefix(f"{name}="))
    return found
