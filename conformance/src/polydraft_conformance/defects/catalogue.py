"""The catalogue: every defect with the check that must catch it and the words that must name it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest
    from polydraft.contract import Backend

__all__ = ["MODULES", "Defect", "catalogue"]

MODULES = (
    *("stepping", "stepping_settings", "stepping_speculation", "stepping_places", "stepping_far", "stepping_kept"),
    *("whole", "whole_settings", "whole_statistics", "whole_places", "whole_rounds", "core", "cheats"),
)
"""The modules of this package that hold defects, each in a tuple ``DEFECTS``."""


@dataclass(frozen=True)
class Defect:
    """One defective backend."""

    name: str
    """A few words, unique: ``stepping: a stale row after rollback``."""
    check: str
    """The check that must fail; all others pass or follow from it."""
    cause: str
    """Words in the first line of its message."""
    backend: Callable[[], type[Backend]]
    """Makes the backend's class."""
    kind: str = "mtp"
    """The drafter kind that it is run with."""
    quick: bool = True
    """Whether the quick run catches it, too."""
    also: frozenset[str] = frozenset()
    """Other checks that may fail by themselves."""
    met_by: frozenset[str] = frozenset()
    """Checks that meet it first where all of a run's are made, which ends with the first failure."""
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    """Puts the defect into the core, for what a backend cannot break."""

    @contextmanager
    def in_place(self) -> Iterator[type[Backend]]:
        """The backend's class; inside the ``with`` block a defect of the core is in place."""
        import pytest

        with pytest.MonkeyPatch.context() as monkeypatch:
            if self.patch is not None:
                self.patch(monkeypatch)
            yield self.backend()


def catalogue() -> tuple[Defect, ...]:
    """All defects. Needs polydraft-reference.

    Raises:
        ImportError: It is not installed.
        ValueError: Two defects have one name.
    """
    found: dict[str, Defect] = {}
    for module in MODULES:
        defects: tuple[Defect, ...] = import_module(f"polydraft_conformance.defects.{module}").DEFECTS
        for defect in defects:
            if defect.name in found:
                raise ValueError(f"Two defects are named {defect.name!r}.")
            found[defect.name] = defect
    return tuple(found.values())
