"""Several reports in one table: checks (or groups of them) by backends."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft_conformance.rendering.markdown import sign_of
from polydraft_conformance.rendering.reading import label
from polydraft_conformance.rendering.statuses import look_of, worst_first

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["BEGIN", "END", "Cell", "cell", "fill", "ordered_checks", "to_matrix"]

BEGIN = "<!-- conformance: begin; written by `polydraft-conformance report`, do not edit -->\n"
END = "<!-- conformance: end -->\n"


@dataclass(frozen=True, slots=True)
class Cell:
    """The result of a check (or a group of checks) in one report."""

    counts: Mapping[str, int]
    """Rows by status."""
    near_ties: int
    diverged: int

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(self.counts.values())

    @property
    def worst(self) -> str:
        """The status that colours the cell: ``pass`` where some rows pass and the rest is not claimed."""
        return next((status for status in worst_first(self.counts) if self.counts[status]), "")


def ordered_checks(reports: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(group, check) of all reports, groups together."""
    found = dict.fromkeys((row["group"], row["check"]) for data in reports for row in data["checks"])
    groups = dict.fromkeys(group for group, _ in found)
    return [pair for group in groups for pair in found if pair[0] == group]


def cell(rows: Iterable[Mapping[str, Any]]) -> Cell:
    """Sum up rows."""
    counted = list(rows)
    verdicts: Counter[str] = Counter()
    for row in counted:
        verdicts.update(row["numbers"].get("verdicts", {}))
    return Cell(Counter(row["status"] for row in counted), verdicts["NEAR_TIE"], verdicts["DIVERGED"])


def to_matrix(reports: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table for a README: a row per report, a column per group of checks, and what each result holds for.

    The column ``ran`` says what was run for real, and on what; ``protocol only``: a stand-in for the engine's server.
    """
    groups = list(dict.fromkeys(group for group, _ in ordered_checks(reports)))
    head = ["backend", "engine", "ran", "dtype, device", "result", *groups, "outputs: exact / near tie / diverged"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for data in reports:
        backend, options = data["backend"], data["options"]
        verdicts = data.get("verdicts", {})
        counts = " / ".join(str(verdicts.get(name, 0)) for name in ("EXACT", "NEAR_TIE", "DIVERGED"))
        if excluded := cell(row for row in data["checks"] if row["status"] == "excluded").diverged:
            counts += f"; {excluded} more diverged in excluded checks"
        usable = data["availability"]["usable"]
        cells = [
            f"`{backend['name']}`",
            " ".join(part for part in (backend["engine"], backend["engine_version"]) if part) or "-",
            _ran(data),
            ", ".join(part for part in (options.get("dtype"), options.get("device")) if part) or "-",
            sign_of(data["status"]),
            *(_text(cell(row for row in data["checks"] if row["group"] == group)) for group in groups),
            counts if usable else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *dict.fromkeys(_measured_on(data) for data in reports), ""]
    return "\n".join(lines)


def fill(text: str, table: str) -> str:
    """A README with the table between its marks.

    Raises:
        ValueError: A mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The marks of the table are missing: {BEGIN.strip()} and {END.strip()}, each in a line.")
    return f"{before}{begin}{table}{end}{after}"


def _text(found: Cell) -> str:
    """``12``, ``12, 2 excluded``, ``FAIL 1 of 12``."""
    counts = found.counts
    if not found.total:
        return "-"
    if wrong := counts.get("fail", 0) + counts.get("follows", 0):
        return f"**FAIL {wrong} of {found.total}**"
    passed = counts.get("pass", 0)
    others = [status for status in worst_first(counts) if counts[status] and status not in {"pass", "not-claimed"}]
    if not passed and others in ([], ["cannot-install"], ["protocol"]):
        return look_of(others[0] if others else "not-claimed").past
    parts = [str(passed)] if passed else []
    return ", ".join([*parts, *(f"{counts[status]} {look_of(status).past}" for status in others)])


def _ran(data: Mapping[str, Any]) -> str:
    """``the engine on AMD EPYC``: what a result was found on."""
    if data["status"] == "protocol":
        return look_of("protocol").past
    if not data["availability"]["usable"]:
        return "-"
    found, device = data["environment"], str(data["options"].get("device") or "cpu")
    kind = device.partition(":")[0]
    named = [one for one in found.get("devices", ()) if str(one.get("name", "")).partition(":")[0] == kind != "cpu"]
    names = dict.fromkeys(str(one.get("description") or one["name"]) for one in named)
    return f"the engine on {', '.join(names) or found.get('processor') or found.get('machine')}"


def _measured_on(data: Mapping[str, Any]) -> str:
    if data["status"] == "protocol":
        return f"- {label(data)}: {data['availability']['reason']}"
    found = data["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    quick = "; quick run" if data["options"].get("quick") else ""
    hardware = found.get("processor") or found.get("machine")
    return f"- {label(data)}: {hardware}, {found['implementation']} {found['python']}; {versions}{quick}"
