"""Applies a backend's ``conformance_exclusions()``: what it leaves out is declared, and the declaration still holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING

from polydraft_conformance.catalog import matching_checks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft.contract import Exclusion

    from polydraft_conformance.pairs import Case

__all__ = ["Exclusions", "describe"]


def describe(exclusion: Exclusion) -> str:
    """``notyet: reason``."""
    return f"{exclusion.status}: {exclusion.reason}"


@dataclass(slots=True)
class Exclusions:
    """The exclusions of one backend."""

    declared: tuple[Exclusion, ...]
    _probed: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, exclusions: Iterable[Exclusion]) -> Exclusions:
        """From what a backend yields."""
        return cls(tuple(exclusions))

    def find(self, check: str, case: Case | None) -> Exclusion | None:
        """The first exclusion that covers a check on a case."""
        for exclusion in self.declared:
            if not fnmatchcase(check, exclusion.check):
                continue
            if case is None:
                if exclusion.pair == "*" and exclusion.drafter_kind == "*":
                    return exclusion
            elif self._covers_case(exclusion, case):
                return exclusion
        return None

    def faults(self) -> list[str]:
        """Errors in the declarations themselves, one sentence each."""
        faults = []
        for exclusion in self.declared:
            named = f"The exclusion {exclusion.check!r}"
            if not matching_checks(exclusion.check):
                faults.append(f"{named} names no check of this suite.")
            if exclusion.status == "notyet" and exclusion.probe is None:
                faults.append(f"{named} is notyet, but has no probe that shows when upstream has fixed it.")
            if exclusion.status != "notyet" and exclusion.probe is not None:
                faults.append(f"{named} is {exclusion.status}, but has a probe: only notyet exclusions have one.")
        return faults

    def is_gone(self, exclusion: Exclusion) -> bool:
        """Whether the probe says that upstream's fault is fixed. Each probe runs once.

        Raises:
            ImportError: The probe's module does not exist.
            AttributeError: The probe's function does not exist.
            Exception: Whatever the probe raises.
        """
        if exclusion.status != "notyet" or exclusion.probe is None:
            return False
        if exclusion.probe not in self._probed:
            module, _, function = exclusion.probe.partition(":")
            self._probed[exclusion.probe] = bool(getattr(import_module(module), function)())
        return not self._probed[exclusion.probe]

    @staticmethod
    def _covers_case(exclusion: Exclusion, case: Case) -> bool:
        # A varied copy is covered by what covers its original.
        pair = case.pair.original or case.pair
        names = (pair.name, pair.target)
        return any(fnmatchcase(name, exclusion.pair) for name in names) and fnmatchcase(
            case.kind, exclusion.drafter_kind
        )
