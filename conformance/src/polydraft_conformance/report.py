"""The report of a run: ``conformance-report.json``, with its Markdown and HTML next to it."""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.hardware import processor
from polydraft.verification import VERDICTS

from polydraft_conformance.catalog import CHECKS
from polydraft_conformance.rendering.markdown import to_markdown
from polydraft_conformance.rendering.page import to_page
from polydraft_conformance.rendering.reading import FORMAT_VERSION, JSON_NAME
from polydraft_conformance.rows import STATUSES, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polydraft.contract import Capabilities, Diagnosis

    from polydraft_conformance.catalog import Check
    from polydraft_conformance.suite import Suite

__all__ = ["HTML_NAME", "JSON_NAME", "MARKDOWN_NAME", "Report", "environment", "report_of", "write"]

MARKDOWN_NAME = "conformance-report.md"
HTML_NAME = "conformance-report.html"


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
    planned: int = 0
    """Number of rows that the whole run has; 0 if unknown."""

    @property
    def status(self) -> str:
        """``pass``, ``fail``, ``incomplete`` (ended before its last check), ``protocol`` or ``cannot-install``."""
        if any(row.status in {"fail", "follows"} for row in self.rows):
            return "fail"
        if len(self.rows) < self.planned:
            return "incomplete"
        if any(row.status == "protocol" for row in self.rows):
            return "protocol"
        return "pass" if self.usable else "cannot-install"

    def summary(self) -> dict[str, int]:
        """Number of rows by status."""
        counts = Counter(row.status for row in self.rows)
        return {status: counts[status] for status in STATUSES}

    def verdicts(self) -> dict[str, int]:
        """Number of compared outputs by verdict, without those of excluded checks."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            if row.status == "excluded":
                continue
            counts.update(row.numbers.get("verdicts", {}))
        return {verdict: counts[verdict] for verdict in VERDICTS}

    def acceptance(self) -> list[dict[str, Any]]:
        """Speculation by case: counts and rates, on the window prompts or on a pair's scored ones."""
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
            "statements": {
                name: CHECKS[name].statement for name in dict.fromkeys(row.check for row in self.rows) if name in CHECKS
            },
            "explanations": {
                name: _explanation(CHECKS[name])
                for name in dict.fromkeys(row.check for row in self.rows)
                if name in CHECKS
            },
            "planned": self.planned,
            "acceptance": self.acceptance(),
            "checks": [row.as_dict() for row in self.rows],
        }


def _explanation(check: Check) -> dict[str, str]:
    """What a check proves, what a failure means, and where to look."""
    parts = {name: getattr(check, name, "") for name in ("proves", "failure", "look")}
    return {name: text for name, text in parts.items() if text}


def report_of(suite: Suite, rows: list[Row], *, planned: int = 0) -> Report:
    """The report of a run, so far or finished.

    Args:
        suite: The run.
        rows: What has been run of it.
        planned: Number of rows that the whole run has; 0 if unknown.
    """
    given, record = suite.options, suite.record
    plugins = [
        status.distribution
        for status in suite.host.statuses()
        if record.name in status.backends and status.distribution
    ]
    required = [name for key in record.requires for name in key.split("|")]
    return Report(
        backend=given.backend,
        options={
            "pairs": list(given.pairs),
            "kinds": list(given.kinds),
            "dtype": given.dtype,
            "device": given.device,
            "quick": given.quick,
            "one_session": given.one_session,
            "seed": given.seed,
            "k": list(suite.k_values),
        },
        environment=environment(suite.diagnosis, [*plugins, record.engine, *required]),
        usable=suite.diagnosis.usable,
        engine=record.engine,
        engine_version=suite.diagnosis.engine_version,
        reason=suite.diagnosis.reason,
        remedy=suite.diagnosis.remedy,
        claims=_claims(suite.capabilities) if suite.capabilities else {},
        # The order of definition: workers finish in any.
        rows=sorted(rows, key=lambda row: (row.group, CHECKS[row.check].order if row.check in CHECKS else -1)),
        planned=planned,
    )


def _claims(capabilities: Capabilities) -> dict[str, Any]:
    """JSON-ready, sets in order."""
    values = capabilities.model_dump(mode="json")
    return {name: sorted(value) if isinstance(value, list) else value for name, value in values.items()}


def environment(diagnosis: Diagnosis | None, distributions: Iterable[str]) -> dict[str, Any]:
    """Versions and hardware that a result holds for.

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


def write(report: Report, folder: Path) -> tuple[Path, Path, Path]:
    """Write JSON, Markdown and HTML, and return their paths. The folder is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(json.dumps(report.as_dict(), ensure_ascii=False))
    json_path, markdown_path, html_path = (folder / name for name in (JSON_NAME, MARKDOWN_NAME, HTML_NAME))
    json_path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    markdown_path.write_text(to_markdown(data), encoding="utf-8")
    html_path.write_text(to_page([data]), encoding="utf-8")
    return json_path, markdown_path, html_path
