"""One row of the report: what became of one check on one case."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["STATUSES", "Row", "Status", "case_of_row", "followed", "follows_from"]

Status = Literal[
    "pass",
    "fail",
    "excluded",
    "follows",
    "not-claimed",
    "not-applicable",
    "unchecked",
    "cannot-install",
    "protocol",
]
"""``excluded``: fails, as the backend declared. ``follows``: fails where a check it builds upon failed.
``not-claimed``: the capabilities do not claim it. ``not-applicable``: the models lack a property that it needs.
``unchecked``: not independently checked, since nothing outside the
engine shows whether what it reports is true. ``cannot-install``: the backend cannot run on this machine. ``protocol``:
only its plugin was tested, against a stand-in for the engine's server."""

STATUSES: tuple[Status, ...] = get_args(Status)
_FOLLOWS = "Follows from "


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one check on one case. JSON-ready: it travels between pytest's processes as a dict."""

    check: str
    group: str
    status: Status
    target: str | None = None
    drafter: str | None = None
    kind: str | None = None
    k: int | None = None
    reason: str = ""
    """Why it did not pass: the first line says what is wrong; evidence may follow."""
    seconds: float = 0.0
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The check's measurements: JSON-ready values by name."""

    def as_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @property
    def case(self) -> str:
        """``tiny-e2b, mtp, k=4``, or an empty string."""
        return case_of_row({"target": self.target, "kind": self.kind, "k": self.k})


def case_of_row(row: Mapping[str, Any]) -> str:
    """``tiny-e2b, mtp, k=4`` of a row of a JSON report, or an empty string."""
    parts = [row["target"], row["kind"], None if row["k"] is None else f"k={row['k']}"]
    return ", ".join(str(part) for part in parts if part)


def follows_from(check: str, reason: str) -> str:
    """The reason of a failure that another check's failure explains."""
    return f"{_FOLLOWS}{check}.\n{reason}"


def followed(reason: str) -> str | None:
    """The check that a reason of ``follows_from`` names; None for any other reason."""
    first = reason.partition("\n")[0]
    return first.removeprefix(_FOLLOWS).removesuffix(".") if first.startswith(_FOLLOWS) else None
