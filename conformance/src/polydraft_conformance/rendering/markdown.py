"""One report as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from polydraft_conformance.rendering.statuses import said_of_products, worst_first
from polydraft_conformance.rows import case_of_row

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["first_line", "sign_of", "to_markdown"]

_SIGNS = {
    "fail": "**FAIL**",
    "unchecked": "not independently checked",
    "cannot-install": "cannot be installed here",
    "protocol": "protocol only",
}


def sign_of(status: str) -> str:
    """A status as it is written in tables; failures stand out."""
    return _SIGNS.get(status, status.replace("-", " "))


def to_markdown(data: Mapping[str, Any]) -> str:
    """The Markdown form of a JSON report: checks by target, what speculation did, and every row that did not pass."""
    lines = [*_head(data), ""]
    if not data["availability"]["usable"]:
        lines += [_join(data["availability"]["reason"], data["availability"]["remedy"]), ""]
        return "\n".join(lines)
    lines += [*_check_table(data["checks"]), ""]
    if data["acceptance"]:
        lines += ["## Acceptance", "", *_acceptance_table(data["acceptance"]), ""]
    near_ties = [(row, tie) for row in data["checks"] for tie in row["numbers"].get("differences", ())]
    near_ties = [(row, tie) for row, tie in near_ties if tie["verdict"] == "NEAR_TIE"]
    if near_ties:
        lines += ["## Near ties", "", *dict.fromkeys(_near_tie(row, tie) for row, tie in near_ties), ""]
    for status, title in (
        ("fail", "Failures"),
        ("follows", "Consequences"),
        ("excluded", "Excluded"),
        ("unchecked", "Not independently checked"),
    ):
        rows = [row for row in data["checks"] if row["status"] == status]
        if rows:
            lines += [f"## {title}", "", *(_item(row) for row in rows), ""]
    return "\n".join(lines)


def _head(data: Mapping[str, Any]) -> list[str]:
    backend, found, options = data["backend"], data["environment"], data["options"]
    engine = " ".join(part for part in (backend["engine"], backend["engine_version"]) if part)
    counts = ", ".join(f"{count} {status}" for status, count in data["summary"].items() if count)
    if data["status"] == "incomplete":
        counts += f"; the run ended early: {len(data['checks'])} of {data['planned']} were run"
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in data.get("verdicts", {}).items())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        f"# Conformance of `{backend['name']}`: {sign_of(data['status'])}",
        "",
        f"- engine: {engine or 'unknown'}; dtype {options.get('dtype', '?')}, device {options.get('device', '?')}",
        f"- {found['implementation']} {found['python']}, {found['platform']}, {found['processor'] or found['machine']}",
        f"- {versions}",
        f"- {counts or 'no checks were run'}{'; quick run' if options.get('quick') else ''}",
        f"- outputs compared: {verdicts or 'none'}",
        *(f"- {said}" for said in [said_of_products(data["checks"])] if said),
    ]


def _check_table(rows: list[dict[str, Any]]) -> list[str]:
    targets = list(dict.fromkeys(row["target"] for row in rows if row["target"]))
    checks = dict.fromkeys((row["group"], row["check"]) for row in rows)
    lines = [
        f"| group | check | {' | '.join(targets)} | reason |",
        "|---|---|" + "---|" * len(targets) + "---|",
    ]
    for group, check in checks:
        mine = [row for row in rows if row["check"] == check and row["group"] == group]
        cells = [_cell([row for row in mine if row["target"] == target]) for target in targets]
        if not any(row["target"] for row in mine):
            cells = [_cell(mine)] * len(targets)
        reasons = dict.fromkeys(first_line(row["reason"]) for row in mine if row["reason"])
        lines.append(f"| {group} | `{check}` | {' | '.join(cells)} | {_escape('; '.join(reasons))} |")
    return lines


def _cell(rows: list[dict[str, Any]]) -> str:
    """``pass 16``, ``**FAIL** 1 of 16``, or an empty cell."""
    if not rows:
        return ""
    counts = Counter(row["status"] for row in rows)
    parts = []
    for status in worst_first(counts):
        sign = sign_of(status)
        parts.append(sign if counts[status] == len(rows) == 1 else f"{sign} {counts[status]}")
    near_ties = sum(row["numbers"].get("verdicts", {}).get("NEAR_TIE", 0) for row in rows)
    return ", ".join(parts) + (f" ({near_ties} near {'tie' if near_ties == 1 else 'ties'})" if near_ties else "")


def _acceptance_table(entries: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| target | drafter | kind | k | prompts | rounds | drafted | accepted | rate | mean acceptance length |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = (
            entry["target"],
            entry["drafter"],
            entry["kind"],
            entry["k"],
            entry["prompts"],
            entry["rounds"],
            entry["drafted"],
            entry["accepted"],
            _number(entry["acceptance_rate"]),
            _number(entry["mean_acceptance_length"]),
        )
        lines.append("| " + " | ".join("?" if cell is None else str(cell) for cell in cells) + " |")
    return lines


def _near_tie(row: Mapping[str, Any], tie: Mapping[str, Any]) -> str:
    margin = tie.get("margin_in_noise")
    measured = "at a filter's edge" if margin is None else f"margin {margin:.2g} times the noise"
    texts = " or ".join(str(text) for text in tie["texts"])
    return f"- {tie['of']}: output token {tie['position']}, {texts}, {measured} (`{row['check']}`)"


def _item(row: Mapping[str, Any]) -> str:
    case = case_of_row(row)
    lines = str(row["reason"]).splitlines() or [""]
    text = f"- `{row['check']}`{f' ({case})' if case else ''}: {lines[0]}"
    if len(lines) > 1:
        text += "\n\n" + "\n".join(f"      {line}" for line in lines[1:]) + "\n"
    return text


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def first_line(text: str) -> str:
    """The first line; empty for an empty text."""
    return text.splitlines()[0] if text else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
