"""One row of the report: what became of one check on one case."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["STATUSES", "Row", "Status"]

Status = Literal["pass", "fail", "excluded", "follows", "not-claimed", "not-applicable", "unchecked", "cannot-install"]
"""``excluded``: fails, as the backend declared. ``follows``: fails where a check it builds upon failed.
``not-claimed``: the capabilities do not claim it. ``not-applicable``: the models lack a property that it needs.
``unchecked``: not independently checked, since nothing outside the
engine shows whether what it reports is true. ``cannot-install``: the backend cannot run on this machine."""

STATUSES: tuple[Status, ...] = get_args(Status)


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
        parts = [self.target, self.kind, None if self.k is None else f"k={self.k}"]
        return ", ".join(part for part in parts if part)
