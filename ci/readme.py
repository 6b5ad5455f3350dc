"""Fill two tables: the README's of speeds, and that of backends in docs/choosing-an-engine.md.

``python ci/readme.py [--check]``: with ``--check`` nothing is written; the exit code is 1 if a page differs. Speeds are
those of a benchmark's file, backends those that are installed, as they declare themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import benchmarks

ROOT = Path(__file__).parents[1]
README, BACKENDS_PAGE = ROOT / "README.md", ROOT / "docs/choosing-an-engine.md"
SPEEDS = ROOT / "plugins/transformers/benchmarks/results/rounds_at_real_shapes_h100.json"
KINDS = ("mtp", "draft-model", "ngram")
MODELS = ("E2B", "E4B", "26B-A4B", "31B")
TOKENS = (2, 3, 4)
"""Tokens a round, of which the table shows the speed."""


def marks(what: str) -> tuple[str, str]:
    """The lines around a table."""
    return f"<!-- {what}: begin; written by `nox -s readme`, do not edit -->\n", f"<!-- {what}: end -->\n"


def backends_table() -> str:
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
    return as_markdown(rows)


def speed_table() -> str:
    """Milliseconds at real shapes, and the speed over plain decoding for some lengths of accepted drafts."""
    result = benchmarks.load(SPEEDS)
    head = ["Gemma 4", "plain: ms a token", "a round: ms", *(f"speed at {count} tokens a round" for count in TOKENS)]
    rows = [head, ["---"] * len(head)]
    for model in MODELS:
        case = {"model": model, "settings": "greedy", "side": "rounds"}
        (values,) = (row.values for row in result.rows if row.case == case)
        plain, round_ = (float(str(values[name])) for name in ("plain_ms", "round_ms"))
        rows.append([model, f"{plain:.1f}", f"{round_:.1f}", *(f"{n * plain / round_:.1f}x" for n in TOKENS)])
    about = f"{result.hardware.accelerator}, {result.settings['dtype']}, torch {result.versions['torch']}"
    link = "[figures](docs/benchmarks.md#transformers-rounds-at-real-shapes)"
    return (
        f"{as_markdown(rows)}\nBackend `transformers` on an {about}, context {result.settings['context']} ({link}).\n"
    )


def as_markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(text: str, what: str, inside: str) -> str:
    """The page with ``inside`` between the marks of a table.

    Raises:
        SystemExit: The page lacks a mark.
    """
    first, last = marks(what)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"A page lacks the marks of the table of {what}.")
    return f"{before}{begin}{inside}{end}{after}"


def main() -> int:
    """Write the tables, or with ``--check`` compare them."""
    failed = 0
    for page, what, table in ((README, "speed", speed_table()), (BACKENDS_PAGE, "backends", backends_table())):
        text = filled(page.read_text(encoding="utf-8"), what, table)
        complaint = f"The table of {what} in {page.name} is out of date: run `nox -s readme`."
        failed |= benchmarks.update(page, text, complaint)
    return failed


if __name__ == "__main__":
    sys.exit(main())
