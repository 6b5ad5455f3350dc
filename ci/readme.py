"""Fill the README's table of backends from the declarations of the installed ones: ``python ci/readme.py [--check]``.

With ``--check`` nothing is written; the exit code is 1 if the README differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import update

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- backends: begin; written by `nox -s readme`, do not edit -->\n"
END = "<!-- backends: end -->\n"
KINDS = ("mtp", "draft-model", "ngram")


def table() -> str:
    """The Markdown table, one row per backend."""
    from polydraft._plugins import default_host

    head = ["backend", "engine", "weights", *KINDS, "what it is"]
    rows = [head, ["---"] * len(head)]
    for record in default_host().backends().values():
        versions = " ".join(version for name, version in record.requires.items() if record.engine in name.split("|"))
        rows.append(
            [
                f"`{record.name}`",
                f"{record.engine} {versions}".strip(),
                ", ".join(sorted(record.formats)),
                *("yes" if kind in record.drafter_kinds else "-" for kind in KINDS),
                record.summary,
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(text: str, inside: str) -> str:
    """The README with ``inside`` between the marks of the table.

    Raises:
        SystemExit: The README lacks a mark.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README.name} lacks the marks of the table.")
    return f"{before}{begin}{inside}{end}{after}"


def main() -> int:
    """Write the table, or with ``--check`` compare it."""
    text = filled(README.read_text(encoding="utf-8"), table())
    complaint = "The README's table of backends does not match their declarations: run `nox -s readme`."
    return update(README, text, complaint)


if __name__ == "__main__":
    sys.exit(main())
