"""The report: ``conformance-report.json``, and a Markdown table made from it."""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft_conformance.comparison import VERDICTS
from polydraft_conformance.rows import STATUSES, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polydraft.contract import Diagnosis

__all__ = ["FORMAT_VERSION", "JSON_NAME", "MARKDOWN_NAME", "Report", "environment", "processor", "to_markdown", "write"]

FORMAT_VERSION = 1
JSON_NAME = "conformance-report.json"
MARKDOWN_NAME = "conformance-report.md"

_SIGNS = {
    "pass": "pass",
    "fail": "**FAIL**",
    "excluded": "excluded",
    "follows": "follows",
    "not-claimed": "not claimed",
    "cannot-install": "cannot be installed here",
}


@dataclass(slots=True)
class Report:
    """Everything that one run found."""

    backend: str
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    usable: bool
    engine: str | None = None
    engine_version: str | None = None
    reason: str = ""
    remedy: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``pass``, ``fail``, or ``cannot-install``."""
        if any(row.status in {"fail", "follows"} for row in self.rows):
            return "fail"
        return "pass" if self.usable else "cannot-install"

    def summary(self) -> dict[str, int]:
        """Number of rows by status."""
        counts = Counter(row.status for row in self.rows)
        return {status: counts[status] for status in STATUSES}

    def verdicts(self) -> dict[str, int]:
        """How many outputs were compared with what verdict; near ties are counted apart."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts.update(row.numbers.get("verdicts", {}))
        return {verdict: counts[verdict] for verdict in VERDICTS}

    def acceptance(self) -> list[dict[str, Any]]:
        """What speculation did, by case: counts and rates, on the window prompts or on those a pair was scored with."""
        return [
            {"target": row.target, "drafter": row.drafter, "kind": row.kind, "k": row.k, **row.numbers["acceptance"]}
            for row in self.rows
            if "acceptance" in row.numbers
        ]

    def as_dict(self) -> dict[str, Any]:
        """The JSON report."""
        return {
            "format_version": FORMAT_VERSION,
            "status": self.status,
            "backend": {
                "name": self.backend,
                "engine": self.engine,
                "engine_version": self.engine_version,
                "claims": dict(self.claims),
            },
            "availability": {"usable": self.usable, "reason": self.reason, "remedy": self.remedy},
            "environment": dict(self.environment),
            "options": dict(self.options),
            "summary": self.summary(),
            "verdicts": self.verdicts(),
            "acceptance": self.acceptance(),
            "checks": [row.as_dict() for row in self.rows],
        }


def environment(diagnosis: Diagnosis | None, distributions: Iterable[str]) -> dict[str, Any]:
    """Versions and hardware: what a result is true of.

    Args:
        diagnosis: The backend's own, for its devices.
        distributions: Further distributions whose versions count.
    """
    versions = {}
    for name in ("polydraft", "polydraft-conformance", "polydraft-builtin-pairs", "numpy", *distributions):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": processor(),
        "devices": [device.model_dump(mode="json") for device in diagnosis.devices] if diagnosis else [],
        "versions": versions,
    }


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write both files and return their paths. The folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    data = report.as_dict()
    json_path, markdown_path = folder / JSON_NAME, folder / MARKDOWN_NAME
    json_path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    markdown_path.write_text(to_markdown(data), encoding="utf-8")
    return json_path, markdown_path


def to_markdown(data: Mapping[str, Any]) -> str:
    """The Markdown form of a JSON report: checks by target, what speculation did, and every row that is not green."""
    lines = [*_head(data), ""]
    if not data["availability"]["usable"]:
        lines += [_join(data["availability"]["reason"], data["availability"]["remedy"]), ""]
        return "\n".join(lines)
    lines += [*_check_table(data["checks"]), ""]
    if data["acceptance"]:
        lines += ["## Acceptance", "", *_acceptance_table(data["acceptance"]), ""]
    for status, title in (("fail", "Failures"), ("follows", "Consequences"), ("excluded", "Excluded")):
        rows = [row for row in data["checks"] if row["status"] == status]
        if rows:
            lines += [f"## {title}", "", *(_item(row) for row in rows), ""]
    return "\n".join(lines)


def _head(data: Mapping[str, Any]) -> list[str]:
    backend, found, options = data["backend"], data["environment"], data["options"]
    engine = " ".join(part for part in (backend["engine"], backend["engine_version"]) if part)
    counts = ", ".join(f"{count} {status}" for status, count in data["summary"].items() if count)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in data["verdicts"].items())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        f"# Conformance of `{backend['name']}`: {_SIGNS[data['status']]}",
        "",
        f"- engine: {engine or 'unknown'}; dtype {options.get('dtype', '?')}, device {options.get('device', '?')}",
        f"- {found['implementation']} {found['python']}, {found['platform']}, {found['processor'] or found['machine']}",
        f"- {versions}",
        f"- {counts or 'no checks were run'}{'; quick run' if options.get('quick') else ''}",
        f"- outputs compared: {verdicts}",
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
        reasons = dict.fromkeys(_first_line(row["reason"]) for row in mine if row["reason"])
        lines.append(f"| {group} | `{check}` | {' | '.join(cells)} | {_escape('; '.join(reasons))} |")
    return lines


def _cell(rows: list[dict[str, Any]]) -> str:
    """``pass 16``, ``**FAIL** 1 of 16``, or an empty cell."""
    if not rows:
        return ""
    counts = Counter(row["status"] for row in rows)
    parts = []
    for status in ("fail", "follows", "excluded", "not-claimed", "cannot-install", "pass"):
        if counts[status] == len(rows):
            parts.append(_SIGNS[status] if len(rows) == 1 else f"{_SIGNS[status]} {len(rows)}")
        elif counts[status]:
            parts.append(f"{_SIGNS[status]} {counts[status]}")
    near_ties = sum(row["numbers"].get("verdicts", {}).get("NEAR_TIE", 0) for row in rows)
    return ", ".join(parts) + (f" ({near_ties} near ties)" if near_ties else "")


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


def _item(row: Mapping[str, Any]) -> str:
    case = ", ".join(str(row[name]) for name in ("target", "kind") if row[name])
    if row["k"] is not None:
        case += f", k={row['k']}"
    lines = str(row["reason"]).splitlines() or [""]
    text = f"- `{row['check']}`{f' ({case})' if case else ''}: {lines[0]}"
    if len(lines) > 1:
        text += "\n\n" + "\n".join(f"      {line}" for line in lines[1:]) + "\n"
    return text


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def processor() -> str:
    """The processor's name, where the platform tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
