"""Read JSON reports of finished runs, and find out before anything is made of them that they are reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FORMAT_VERSION", "JSON_NAME", "ReportError", "label", "read_reports"]

FORMAT_VERSION = 1
JSON_NAME = "conformance-report.json"
_PARTS = {
    "status": str,
    "backend": dict,
    "availability": dict,
    "environment": dict,
    "options": dict,
    "summary": dict,
    "acceptance": list,
    "checks": list,
}
_OF_A_ROW = frozenset({"check", "group", "status", "target", "drafter", "kind", "k", "reason", "seconds", "numbers"})


class ReportError(ValueError):
    """A file or folder is not what a command needs; the message says what to give it instead."""


def read_reports(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read JSON reports from files, and from folders recursively; sorted by backend, dtype and device.

    Raises:
        ReportError: A file is not a report, or a folder holds none.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob(JSON_NAME)) if path.is_dir() else [path]
        if not found:
            raise ReportError(f"{path} holds no {JSON_NAME}. Run the suite with --polydraft-report {path}.")
        files += found
    return sorted((_read(file) for file in dict.fromkeys(files)), key=label)


def label(data: Mapping[str, Any]) -> str:
    """``transformers, bfloat16, cpu``: what distinguishes a report from others."""
    options = data["options"]
    return ", ".join(
        str(part) for part in (data["backend"]["name"], options.get("dtype"), options.get("device")) if part
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{file} cannot be read: {error.strerror}. Name a {JSON_NAME}, or its folder.") from error
    except ValueError as error:
        raise ReportError(f"{file} is not a conformance report: it is not JSON. Name a {JSON_NAME}.") from error
    if fault := _fault(data):
        raise ReportError(f"{file} is not a conformance report: {fault}. Name a {JSON_NAME}.")
    if data.get("format_version", 0) > FORMAT_VERSION:
        raise ReportError(f"{file} was written by a later version. Upgrade polydraft-conformance.")
    return dict(data)


def _fault(data: Any) -> str:
    """What a report has and ``data`` lacks; empty if it is one."""
    if not isinstance(data, dict):
        return "it is no JSON object"
    for name, kind in _PARTS.items():
        if not isinstance(data.get(name), kind):
            return f"it lacks {name!r}"
    if not isinstance(data["backend"].get("name"), str):
        return "it lacks the backend's name"
    if not isinstance(data.get("format_version", 0), int):
        return "its format_version is no number"
    for number, row in enumerate(data["checks"], start=1):
        missing = _OF_A_ROW - row.keys() if isinstance(row, dict) else _OF_A_ROW
        if missing:
            return f"its row {number} lacks {sorted(missing)[0]!r}"
    return ""
