"""Fill two tables, the README's of speeds and that of backends in docs/choosing-an-engine.md, and draw the speeds.

``python ci/readme.py [--check]``: with ``--check`` nothing is written; the exit code is 1 if a page differs. Speeds are
those of a benchmark's file, backends those that are installed, as they declare themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import benchmarks

ROOT = Path(__file__).parents[1]
README, BACKENDS_PAGE = ROOT / "README.md", ROOT / "docs/choosing-an-engine.md"
CHART = ROOT / "docs/speed.svg"
SPEEDS = ROOT / "plugins/transformers/benchmarks/results/headline_h200.json"
OTHER_SPEEDS = SPEEDS.with_name("headline_vllm_h200.json")
REPEAT = "python plugins/transformers/benchmarks/headline.py --save h200"
KINDS = ("mtp", "draft-model", "ngram")
MODELS = ("E2B", "E4B", "26B-A4B", "31B")


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
    """Tokens a second, plain and with the best number of drafts, and a chart; beside vLLM's."""
    ours, vllm = benchmarks.load(SPEEDS), benchmarks.load(OTHER_SPEEDS)
    head = ["tokens a second", "plain", "with drafts", "", "drafts a round", "vLLM: plain", "vLLM: 4 drafts a round"]
    rows = [head, ["---"] * len(head)]
    for model in MODELS:
        speeds, others = tokens_per_second(ours, model), tokens_per_second(vllm, model)
        best = max(speeds, key=lambda k: speeds[k])
        theirs = (f"{others[k]:.0f}" if k in others else "-" for k in (0, 4))
        faster = f"**{speeds[best] / speeds[0]:.1f}x**"
        rows.append([model, f"{speeds[0]:.0f}", f"{speeds[best]:.0f}", faster, str(best), *theirs])
    about = f"{ours.hardware.accelerator}, {ours.settings['dtype']}, torch {ours.versions['torch']}, {ours.when}"
    link = "[figures](docs/benchmarks.md#transformers-tokens-a-second-on-a-gpu)"
    return (
        f"![Bars of these tokens a second](docs/speed.svg)\n\n{as_markdown(rows)}\n"
        f"Backend `transformers` on an {about}, context {ours.settings['context']}, synthetic acceptance "
        f"{ours.settings['acceptance']}, the best number of drafts; vLLM {vllm.versions['vllm']}, measured earlier on "
        f"a GPU of the same kind ({link}). `{REPEAT}` measures ours again.\n"
    )


def tokens_per_second(result: benchmarks.Result, model: str) -> dict[int, float]:
    """By drafts a round; 0: plain decoding."""
    rows = (row for row in result.rows if row.case["model"] == model)
    return {int(row.case["k"]): float(str(row.values["expected_tokens_per_second"])) for row in rows}


def chart() -> str:
    """The table as bars, an SVG: each model's, relative to its plain decoding."""
    ours, vllm = benchmarks.load(SPEEDS), benchmarks.load(OTHER_SPEEDS)
    left, width, bar, gap = 90, 420, 16, 18
    parts: list[str] = []
    top = 34
    for model in MODELS:
        speeds, others = tokens_per_second(ours, model), tokens_per_second(vllm, model)
        bars = [("plain", "#9aa5b1", speeds[0]), ("drafts", "#2f7d5b", max(speeds.values()))]
        bars += [
            (name, colour, others[k])
            for k, name, colour in ((0, "vLLM", "#c9ced6"), (4, "vLLM", "#a8c8b8"))
            if k in others
        ]
        parts.append(f'<text x="{left - 10}" y="{top + bar}" text-anchor="end" font-weight="bold">{model}</text>')
        for _, colour, value in bars:
            length = width * value / speeds[0] / 4
            parts.append(f'<rect x="{left}" y="{top}" width="{length:.0f}" height="{bar - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{left + length + 6:.0f}" y="{top + bar - 5}">{value:.0f}</text>')
            top += bar
        top += gap
    legend = (
        ("plain", "#9aa5b1"),
        ("with drafts", "#2f7d5b"),
        ("vLLM plain", "#c9ced6"),
        ("vLLM with drafts", "#a8c8b8"),
    )
    for at, (name, colour) in enumerate(legend):
        parts.append(f'<rect x="{left + 120 * at}" y="8" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 120 * at + 17}" y="18">{name}</text>')
    told = f"{ours.hardware.accelerator}, one user, synthetic acceptance {ours.settings['acceptance']}"
    how = f"{told}; ours: the best number of drafts, vLLM: 4"
    parts.append(f'<text x="{left}" y="{top}" fill="#555555" font-size="10">{how}</text>')
    top += 10
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 {top}" width="600" height="{top}" '
        f'font-family="sans-serif" font-size="12">\n<title>Tokens a second</title>\n'
        f'<rect width="600" height="{top}" fill="#ffffff"/>\n{inside}\n</svg>\n'
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
    failed |= benchmarks.update(CHART, chart(), f"{CHART.name} is out of date: run `nox -s readme`.")
    return failed


if __name__ == "__main__":
    sys.exit(main())
