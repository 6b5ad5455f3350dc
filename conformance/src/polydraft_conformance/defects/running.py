"""Runs the suite on defects of the catalogue, judges whether each is caught, and writes the catalogue as a table."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft import PluginHost

from polydraft_conformance.catalog import built_upon
from polydraft_conformance.defects.catalogue import Defect, catalogue
from polydraft_conformance.defects.making import PluginOf
from polydraft_conformance.testing import run_in_process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft_conformance.testing import SuiteRun

__all__ = ["matching", "missed", "options_for", "run", "to_table"]


def matching(patterns: Sequence[str]) -> tuple[Defect, ...]:
    """The defects whose names match one of the globs; without any, all.

    Raises:
        LookupError: A pattern matches none.
    """
    defects = catalogue()
    for pattern in patterns:
        if not any(fnmatchcase(defect.name, pattern) for defect in defects):
            raise LookupError(f"No defect is named {pattern!r}. `polydraft-conformance defects` lists them.")
    return tuple(
        defect for defect in defects if not patterns or any(fnmatchcase(defect.name, each) for each in patterns)
    )


def options_for(defect: Defect, *, full: bool, all_checks: bool = False) -> list[str]:
    """pytest's options for a run of the suite on a defect, which ends with the first failure.

    Args:
        defect: The defect.
        full: A full run instead of a quick one.
        all_checks: Run all checks; otherwise the one that must fail, with those that it builds upon.
    """
    options = ["-x", "--polydraft-kinds", defect.kind, *["--polydraft-quick"] * (not full)]
    if not all_checks:
        options += ["-k", " or ".join(name for each in (defect.check, *defect.also) for name in built_upon(each))]
    return options


def run(defect: Defect, *, full: bool, seed: int | None = None) -> str:
    """Run all checks of the suite on a defect until one fails.

    Args:
        defect: It is in place meanwhile.
        full: A full run instead of a quick one.
        seed: The run's seed; None: a new one.

    Returns:
        Why it is not caught; empty if it is.
    """
    options = options_for(defect, full=full, all_checks=True)
    if seed is not None:
        options += ["--polydraft-seed", str(seed)]
    with defect.in_place() as backend, tempfile.TemporaryDirectory() as folder:
        host = PluginHost({"tested": PluginOf(backend, name="reference")})
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = run_in_process("reference", *options, host=host, rootdir=Path(folder))
    return missed(found, defect)


def missed(found: SuiteRun, defect: Defect) -> str:
    """Why a run does not catch a defect, one sentence; empty if it does: by its check, with its cause."""
    failed = [row for row in found.report.rows if row.status == "fail"] if found.report else []
    reasons = [row.reason for row in failed if row.check == defect.check]
    firsts = {row.check: row.reason.splitlines()[0] for row in failed}
    if found.exit_code == 0:
        return "the suite passes"
    unexpected = set(firsts) - {defect.check, *defect.also, *defect.met_by}
    if unexpected or not (reasons or set(firsts) & defect.met_by):
        return f"{defect.check} should fail, these do: {firsts}"
    if reasons and not any(defect.cause in reason.splitlines()[0] for reason in reasons):
        return f"{defect.check} does not name the cause ({defect.cause!r}): {firsts}"
    return ""


def to_table(*, full_only: bool = False) -> str:
    """The catalogue as a Markdown table.

    Args:
        full_only: Leave out what the quick run catches.
    """
    lines = ["| defect | check | the message says | caught by |", "|---|---|---|---|"]
    for defect in catalogue():
        if defect.quick and full_only:
            continue
        by = "quick and full runs" if defect.quick else "full runs only"
        lines.append(f"| {defect.name} | `{defect.check}` | {defect.cause} | {by} |")
    return "\n".join(lines)
