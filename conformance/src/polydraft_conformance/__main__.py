"""``polydraft-conformance``: reports without a run.

``polydraft-conformance unavailable NAME --reason TEXT --report DIR`` records that a backend cannot be installed here: a
result beside those of the backends that can. ``polydraft-conformance markdown FILE`` renders a JSON report again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from polydraft_conformance.report import Report, environment, to_markdown, write
from polydraft_conformance.rows import Row

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="polydraft-conformance", description="Reports of the conformance suite.")
    commands = parser.add_subparsers(dest="command", required=True)
    unavailable = commands.add_parser("unavailable", help="record that a backend cannot be installed on this platform")
    unavailable.add_argument("backend")
    unavailable.add_argument("--reason", required=True, help="one sentence")
    unavailable.add_argument("--remedy", default="", help="what would mend it, if anything")
    unavailable.add_argument("--report", type=Path, required=True, metavar="DIR")
    markdown = commands.add_parser("markdown", help="print the Markdown form of a JSON report")
    markdown.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "markdown":
        try:
            print(to_markdown(json.loads(options.file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError) as error:
            print(f"polydraft-conformance: {options.file} is no report: {error!r}", file=sys.stderr)
            return 1
        return 0
    for path in write(_unavailable(options.backend, options.reason, options.remedy), options.report):
        print(path)
    return 0


def _unavailable(backend: str, reason: str, remedy: str) -> Report:
    row = Row("test_backend_can_run_here", "availability", "cannot-install", reason=reason)
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
