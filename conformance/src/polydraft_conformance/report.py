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
from polydraft_conformance.rows import STATUSES, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polydraft.contract import Capabilities, Diagnosis

    from polydraft_conformance.suite import Suite

__all__ = ["FORMAT_VERSION", "HTML_NAME", "JSON_NAME", "MARKDOWN_NAME", "Report", "environment", "report_of", "write"]

FORMAT_VERSION = 1
JSON_NAME = "conformance-report.json"
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
        """Number of compared outputs by verdict."""
        counts: Counter[str] = Counter()
        for row in self.rows:
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
            "acceptance": self.acceptance(),
            "checks": [row.as_dict() for row in self.rows],
        }


def report_of(suite: Suite, rows: list[Row]) -> Report:
    """The report of a run, so far or finished."""
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
        rows=sorted(rows, key=lambda row: row.group),
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
