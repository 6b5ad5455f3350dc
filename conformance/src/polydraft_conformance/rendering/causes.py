"""Failures by cause: rows of one check that say the same are one, and what follows from a failure is counted there."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polydraft_conformance.rows import case_of_row, followed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Cause", "causes", "shape_of"]

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(slots=True)
class Cause:
    """One cause of failures."""

    check: str
    rows: list[Mapping[str, Any]]
    """What failed of it, the first case first."""
    followers: Counter[str] = field(default_factory=Counter)
    """Rows that follow from it, by check."""

    @property
    def reason(self) -> str:
        """The first case's reason, evidence included."""
        return str(self.rows[0]["reason"])

    @property
    def cases(self) -> list[str]:
        """The cases that failed."""
        return [case_of_row(row) for row in self.rows]


def shape_of(reason: str) -> str:
    """The first line without its numbers: cases whose reasons differ in these only have one cause."""
    return _NUMBER.sub("#", reason.partition("\n")[0])


def causes(rows: Sequence[Mapping[str, Any]]) -> list[Cause]:
    """The causes of all failures, in the order of the rows.

    Args:
        rows: Of a JSON report.
    """
    found: dict[tuple[str, str], Cause] = {}
    for row in rows:
        if row["status"] == "fail":
            key = row["check"], shape_of(row["reason"])
            found.setdefault(key, Cause(row["check"], [])).rows.append(row)
    following = [row for row in rows if row["status"] == "follows"]
    for row in following:
        if cause := _cause_of(row, list(found.values()), following):
            cause.followers[row["check"]] += 1
    return list(found.values())


def _cause_of(row: Mapping[str, Any], known: Sequence[Cause], following: Sequence[Mapping[str, Any]]) -> Cause | None:
    """The cause that a row follows from, if need be through other consequences."""
    check, seen = followed(row["reason"]), set[str]()
    while check is not None and check not in seen:
        seen.add(check)
        mine = [cause for cause in known if cause.check == check]
        if mine:
            near = [cause for cause in mine if any(_same_place(row, other) for other in cause.rows)]
            return (near or mine)[0]
        between = [other for other in following if other["check"] == check]
        between.sort(key=lambda other: not _same_place(row, other))
        check = followed(between[0]["reason"]) if between else None
    return None


def _same_place(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool((row["target"], row["kind"]) == (other["target"], other["kind"]))
