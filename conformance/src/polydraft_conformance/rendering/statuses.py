"""How each status is shown: its words, its mark and its tone. Every renderer takes them from here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "Look",
    "Tone",
    "counted",
    "counted_by_status",
    "look_of",
    "rank_of",
    "said_of_a_run",
    "said_of_products",
    "worst_first",
]

Tone = Literal["good", "bad", "warn", "off"]
"""``good`` is green, ``bad`` red, ``warn`` amber; ``off`` is grey: nothing was proven, and nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Look:
    """The look of one status."""

    one: str
    """After the number 1 or a single row: ``1 fails``."""
    many: str
    """After any other number: ``2 fail``."""
    past: str
    """In the summary of a finished run: ``2 failed``."""
    tone: Tone
    mark: str
    plain_mark: str
    """For terminals without Unicode."""


# The worst first: where several statuses meet in a cell, the first of them colours it. What is not claimed, or
# does not apply to a model, takes nothing from what passes.
_LOOKS = {
    "fail": Look("fails", "fail", "failed", "bad", "✗", "X"),
    "follows": Look("follows from another failure", "follow from another failure", "follow", "warn", "↳", ">"),
    "excluded": Look("excluded", "excluded", "excluded", "warn", "○", "o"),
    "cannot-install": Look("cannot run here", "cannot run here", "cannot run here", "off", "∅", "0"),
    "protocol": Look("protocol only", "protocol only", "protocol only", "off", "≈", "~"),
    "unchecked": Look(
        "not independently checked", "not independently checked", "not independently checked", "off", "?", "?"
    ),
    "pass": Look("passes", "pass", "passed", "good", "✓", "+"),
    "not-applicable": Look("not applicable", "not applicable", "not applicable", "off", "·", "."),
    "not-claimed": Look("not claimed", "not claimed", "not claimed", "off", "·", "."),
}
_RUNS = {
    "pass": ("passes", "conforms", "conform"),
    "fail": ("fails", "fails", "fail"),
    "incomplete": ("is incomplete", "was not run to its end", "were not run to their end"),
    "protocol": ("protocol only", "was tested against a stand-in only", "were tested against stand-ins only"),
    "cannot-install": ("cannot run here", "cannot run where it was tried", "cannot run where they were tried"),
}


def look_of(status: str) -> Look:
    """The look of a status; one that this version does not know is shown by its name, in grey."""
    words = status.replace("-", " ")
    return _LOOKS.get(status) or Look(words, words, words, "off", "·", ".")


def worst_first(statuses: Iterable[str]) -> list[str]:
    """The statuses, each once, the worst first; unknown ones come before those that pass."""
    return sorted(dict.fromkeys(statuses), key=rank_of)


def rank_of(status: str) -> int:
    """Sort key: the worst status first."""
    known = list(_LOOKS)
    return known.index(status) if status in _LOOKS else known.index("pass") - 1


def counted(count: int, status: str) -> str:
    """``1 fails``, ``2 fail``."""
    look = look_of(status)
    return f"{count} {look.one if count == 1 else look.many}"


def counted_by_status(rows: Iterable[Mapping[str, Any]]) -> str:
    """``2 failed, 10 passed``: what became of rows, the worst first."""
    counts = Counter(row["status"] for row in rows)
    return ", ".join(f"{counts[status]} {look_of(status).past}" for status in worst_first(counts))


def said_of_a_run(status: str) -> tuple[str, str, str]:
    """What is said of a run of this status: in a heading, of one backend, of several."""
    words = status.replace("-", " ")
    return _RUNS.get(status, (words, words, words))


def said_of_products(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the engine says of its matrix products where it widens tolerances, a sentence; empty if it says nothing."""
    said = sorted({row["numbers"]["matmul_precision"] for row in rows if "matmul_precision" in row["numbers"]})
    if not said:
        return ""
    return f"The engine declares matrix products in {', '.join(said)}: tolerances are those of that precision."
