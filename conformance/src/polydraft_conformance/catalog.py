"""The catalogue of checks: what each is repeated for, which claim it needs, and which checks it builds upon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

import pytest

from polydraft_conformance.docstrings import read_sections
from polydraft_conformance.signals import ModelsDoNotSuit, NotClaimed, NotIndependentlyChecked

if TYPE_CHECKING:
    from polydraft.contract import Capabilities

__all__ = [
    "CHECKS",
    "Check",
    "Scope",
    "built_upon",
    "check",
    "load_checks",
    "matching_checks",
    "not_applicable",
    "not_claimed",
    "rank",
    "unchecked",
]

Scope = Literal["backend", "once", "target", "method", "kind", "case"]
"""What a check is repeated for in a full run, and in a quick one, which leaves out combinations:

============ ================================= ==================================================================
scope        full run                          quick run
============ ================================= ==================================================================
``case``     every pair, drafter kind and k    every pair and drafter kind at the usual k; at others as ``kind``
``kind``     every pair and drafter kind       every pair with its own drafter, every other kind once
``method``   every pair and drafter kind       every drafter kind once, on as many pairs as possible
``target``   every pair, with its own drafter  the same
``once``     the first pair                    the same
``backend``  nothing is loaded                 the same
============ ================================= ==================================================================
"""

Claim = Callable[["Capabilities"], str | None]
"""Says why the capabilities do not claim what a check tests; None if they do."""

F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the suite."""

    name: str
    group: str
    scope: Scope
    statement: str = field(compare=False)
    """What holds if it passes, one sentence."""
    proves: str = field(default="", compare=False)
    """What a pass says about the backend."""
    failure: str = field(default="", compare=False)
    """What a failure means."""
    look: str = field(default="", compare=False)
    """Where to look after a failure."""
    after: tuple[str, ...] = ()
    claims: Claim | None = None
    time_factor: float = 1.0
    order: int = 0


CHECKS: dict[str, Check] = {}
"""All checks whose modules were imported, by name, in the order of definition."""


def not_claimed(reason: str) -> NoReturn:
    """End a check because the backend does not claim what it tests.

    Args:
        reason: Names the capability, one sentence.
    """
    raise NotClaimed(reason)


def not_applicable(reason: str) -> NoReturn:
    """End a check because the models lack a property without which it proves nothing.

    Args:
        reason: Names the property and what would give it.
    """
    raise ModelsDoNotSuit(reason)


def unchecked(reason: str) -> NoReturn:
    """End a check because what it would compare cannot be observed from outside this engine.

    Args:
        reason: What would be needed, one sentence.
    """
    raise NotIndependentlyChecked(reason)


def check(
    *, scope: Scope, after: tuple[str, ...] = (), claims: Claim | None = None, time_factor: float = 1.0
) -> Callable[[F], F]:
    """Declare a test function as a check of the suite. Its docstring says what it proves (``explain.read_sections``).

    Args:
        scope: What it is repeated for.
        after: Names of checks it builds upon. Where one of them failed for the same target and drafter kind, a
            failure of this one is reported as its consequence, not as a separate fault.
        claims: Which capability it needs.
        time_factor: It may take this many times the time limit of a check.
    """

    def declare(function: F) -> F:
        name = function.__name__
        if name in CHECKS and CHECKS[name].group != _group(function):
            raise ValueError(f"Two checks are named {name}.")
        if not function.__doc__:
            raise ValueError(f"The check {name} has no docstring.")
        CHECKS[name] = Check(
            name=name,
            group=_group(function),
            scope=scope,
            **read_sections(function.__doc__),
            after=after,
            claims=claims,
            time_factor=time_factor,
            order=CHECKS[name].order if name in CHECKS else len(CHECKS),
        )
        # A project that turns warnings into errors means its own; that a drafter is of no use is a warning, too.
        marked: F = pytest.mark.filterwarnings("default")(pytest.mark.polydraft_check(name)(function))
        return marked

    return declare


def load_checks() -> dict[str, Check]:
    """All checks of the suite, including those whose modules pytest did not collect."""
    from polydraft_conformance import checks

    for module in iter_modules(checks.__path__):
        import_module(f"{checks.__name__}.{module.name}")
    return CHECKS


def matching_checks(pattern: str) -> list[str]:
    """Names of the suite's checks that a glob pattern matches."""
    load_checks()
    return [name for name in CHECKS if fnmatchcase(name, pattern)]


def built_upon(name: str) -> list[str]:
    """A check and all that it builds upon, in the order of definition."""
    load_checks()
    wanted, found = [name], set()
    while wanted:
        each = wanted.pop()
        if each not in found:
            found.add(each)
            wanted += CHECKS[each].after
    return [each for each in CHECKS if each in found]


def rank(check: Check) -> tuple[int, int]:
    """Sort key that puts a check after those it builds upon, and otherwise keeps the order of definition."""
    return _depth(check), check.order


def _depth(check: Check) -> int:
    return 1 + max((_depth(CHECKS[name]) for name in check.after if name in CHECKS), default=-1)


def _group(function: Callable[..., None]) -> str:
    """``greedy`` for a function of ``checks/test_greedy.py``."""
    return function.__module__.rpartition(".")[2].removeprefix("test_")
