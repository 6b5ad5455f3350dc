"""``polydraft-conformance``: commands that do not run the suite.

``polydraft-conformance unavailable NAME --reason TEXT --report DIR`` records that a backend cannot be installed here: a
result next to those of the backends that can; ``polydraft-conformance protocol`` that it was tested against a stand-in
for its server only. ``polydraft-conformance markdown FILE`` renders a JSON report again.
``polydraft-conformance report PATH... --html FILE --matrix FILE --readme FILE`` merges the reports of several backends.
``polydraft-conformance diff OLD NEW`` says what broke, was mended and moved between two runs.
``polydraft-conformance defects`` lists the defective backends that the suite is tested on; ``--run`` runs it on them.
``polydraft-conformance imports PACKAGE`` fails if a plugin imports a private part of polydraft.
``polydraft-conformance explain CHECK`` says what a check proves, what a failure means, and where to look.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from polydraft.errors import PolydraftError

from polydraft_conformance.explain import to_list, to_text, write_pages
from polydraft_conformance.imports import private_imports, source_of
from polydraft_conformance.rendering.diff import THRESHOLD, compare_all
from polydraft_conformance.rendering.diff import to_text as diff_text
from polydraft_conformance.rendering.markdown import to_markdown
from polydraft_conformance.rendering.matrix import fill, to_matrix
from polydraft_conformance.rendering.page import to_page
from polydraft_conformance.rendering.reading import ReportError, read_reports
from polydraft_conformance.report import Report, environment, write
from polydraft_conformance.rows import Row, Status

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="polydraft-conformance", description="Reports of the conformance suite.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("unavailable", "record that a backend cannot be installed on this platform"),
        ("protocol", "record that a backend was tested against a stand-in for its server only"),
    ):
        recorded = commands.add_parser(name, help=help_text)
        recorded.add_argument("backend")
        recorded.add_argument("--reason", required=True, help="one sentence")
        recorded.add_argument("--remedy", default="", help="what would fix it, if anything")
        recorded.add_argument("--report", type=Path, required=True, metavar="DIR")
    markdown = commands.add_parser("markdown", help="print the Markdown form of a JSON report")
    markdown.add_argument("file", type=Path)
    merge = commands.add_parser("report", help="merge the JSON reports of several runs into one page or table")
    merge.add_argument("path", nargs="+", type=Path, help="reports, or folders that contain them")
    merge.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    merge.add_argument("--matrix", metavar="FILE", help="write the Markdown table; - prints it")
    merge.add_argument("--readme", type=Path, metavar="FILE", help="insert the table between the marks of a README")
    diff = commands.add_parser(
        "diff",
        help="compare two runs: what broke, what was mended, what moved",
        description="Compare two runs. Exit code: 1 if something broke, 0 if nothing did, 2 for unusable input.",
    )
    diff.add_argument("old", type=Path, help="a JSON report, or a folder of them")
    diff.add_argument("new", type=Path, help="a later one")
    diff.add_argument("--json", action="store_true", help="print data instead of text")
    diff.add_argument(
        "--threshold",
        type=_rate,
        default=THRESHOLD,
        metavar="RATE",
        help=f"tell acceptance rates that moved by at least this; default: {THRESHOLD:g}",
    )
    defects = commands.add_parser(
        "defects", help="list the defective backends that the suite is tested on, or run it on them"
    )
    defects.add_argument("--run", nargs="*", metavar="NAME", help="run the suite on these (globs; none: on all)")
    defects.add_argument("--full", action="store_true", help="full runs instead of quick ones")
    defects.add_argument("--full-only", action="store_true", help="list what only full runs catch")
    imports = commands.add_parser("imports", help="fail if a plugin imports a private part of polydraft")
    imports.add_argument("package", nargs="+", help="import name or folder")
    explain = commands.add_parser("explain", help="say what checks prove, what a failure means, and where to look")
    explain.add_argument("check", nargs="*", help="names of checks (globs); without one, all are listed")
    explain.add_argument("--write", type=Path, metavar="DIR", help="write a page for each check, and an index")
    options = parser.parse_args(arguments)
    if options.command == "explain":
        return _explain(options.check, options.write)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # no text is lost where the terminal's encoding has no sign for it
            stream.reconfigure(errors="backslashreplace")
    if options.command == "imports":
        return _check_imports(options.package)
    if options.command == "diff":
        return _diff(options.old, options.new, options.threshold, as_json=options.json)
    if options.command == "defects":
        return _defects(options.run, full=options.full, full_only=options.full_only)
    if options.command == "report":
        return _merge(options.path, options.html, options.matrix, options.readme)
    if options.command == "markdown":
        try:
            print(to_markdown(json.loads(options.file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError) as error:
            print(f"polydraft-conformance: {options.file} is not a report: {error!r}", file=sys.stderr)
            return 1
        return 0
    status: Status = "protocol" if options.command == "protocol" else "cannot-install"
    for path in write(_recorded(options.backend, status, options.reason, options.remedy), options.report):
        print(path)
    return 0


def _merge(paths: list[Path], html: Path | None, matrix: str | None, readme: Path | None) -> int:
    """Write the page and the tables that were asked for; by default print the table."""
    try:
        reports = read_reports(paths)
        table = to_matrix(reports)
        if readme is not None:
            filled = fill(readme.read_text(encoding="utf-8"), table)
            readme.write_text(filled, encoding="utf-8")
        if matrix not in {None, "-"}:
            Path(str(matrix)).write_text(table, encoding="utf-8")
        if html is not None:
            html.write_text(to_page(reports), encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"polydraft-conformance: {error}", file=sys.stderr)
        return 1
    if matrix == "-" or (html is None and matrix is None and readme is None):
        print(table)
    # To stderr: a table on stdout may go into a file.
    for written in (matrix if matrix != "-" else None, readme):
        if written is not None:
            print(f"The table of {_runs(reports)} is in {written}", file=sys.stderr)
    if html is not None:
        print(f"Open {html.resolve().as_uri()} in a browser: the page of {_runs(reports)}", file=sys.stderr)
    return 0


def _runs(reports: list[dict[str, Any]]) -> str:
    return f"{len(reports)} run{'' if len(reports) == 1 else 's'}"


def _diff(old: Path, new: Path, threshold: float, *, as_json: bool) -> int:
    try:
        found = compare_all(read_reports([old]), read_reports([new]), threshold)
    except ReportError as error:
        print(f"polydraft-conformance: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else diff_text(found))
    return 1 if found["broke"] else 0


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1, such as {THRESHOLD:g}")
    return value


def _defects(names: list[str] | None, *, full: bool, full_only: bool) -> int:
    """Print the catalogue, or run the suite on its entries and say which are caught."""
    try:
        from polydraft_conformance.defects.running import matching, run, to_table
    except ImportError as error:
        missing = PolydraftError(
            f"The catalogue's backends are variants of the reference engine, and {error.name} is not installed.",
            "Run: pip install 'polydraft-conformance[defects]'",
        )
        print(f"polydraft-conformance: {missing}", file=sys.stderr)
        return 2
    if names is None:
        print(to_table(full_only=full_only))
        return 0
    try:
        chosen = matching(names)
    except LookupError as error:
        print(f"polydraft-conformance: {error.args[0]}", file=sys.stderr)
        return 2
    missed = 0
    for defect in chosen:
        if not full and not defect.quick:
            print(f"full run only  {defect.name}", flush=True)
            continue
        problem = run(defect, full=full)
        missed += bool(problem)
        print(f"{'MISSED' if problem else 'caught':13}  {defect.name}{problem and ': ' + problem}", flush=True)
    return 1 if missed else 0


def _check_imports(names: list[str]) -> int:
    found = []
    for name in names:
        try:
            found += private_imports(source_of(name))
        except (LookupError, OSError, SyntaxError) as error:
            print(f"polydraft-conformance: {error}", file=sys.stderr)
            return 2
    for problem in found:
        print(problem)
    print(f"{', '.join(names)}: {len(found) or 'no'} private imports", file=sys.stderr)
    return 1 if found else 0


def _explain(patterns: list[str], folder: Path | None) -> int:
    try:
        if folder is not None:
            print(f"{folder}: {write_pages(folder)} checks", file=sys.stderr)
        else:
            print(to_text(patterns) if patterns else to_list(), flush=True)
    except BrokenPipeError:  # the reader, such as ``head``, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (LookupError, OSError) as error:
        print(f"polydraft-conformance: {error}", file=sys.stderr)
        return 2
    return 0


def _recorded(backend: str, status: Status, reason: str, remedy: str) -> Report:
    """The report of a backend on which the suite cannot run."""
    row = Row("test_backend_can_run_here", "availability", status, reason=reason)
    return Report(
        backend=backend,
        options={},
        environment=environment(None, ()),
        usable=False,
        reason=reason,
        remedy=remedy,
        rows=[row],
    )


if __name__ == "__main__":
    sys.exit(main())
