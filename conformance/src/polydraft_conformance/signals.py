"""Exceptions that end a check, apart from assertions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.outcomes import Failed, Skipped
else:  # the public names, which type checkers treat as variables
    Failed, Skipped = pytest.fail.Exception, pytest.skip.Exception

__all__ = [
    "CannotInstallError",
    "DeclarationError",
    "ExcludedWithoutRun",
    "Failed",
    "LeftOut",
    "ModelsDoNotSuit",
    "NotClaimed",
    "NotIndependentlyChecked",
    "Skipped",
    "TimeLimitError",
]


class NotClaimed(Skipped):
    """The backend does not claim what a check tests. The only skip that needs no exclusion."""


class NotIndependentlyChecked(Skipped):
    """Nothing outside the engine shows whether what it reports is true: neither a pass nor a failure."""


class ModelsDoNotSuit(Skipped):
    """The models lack a property without which the check proves nothing."""


class LeftOut(Skipped):
    """An option of the run leaves out what a check needs."""


class ExcludedWithoutRun(Skipped):
    """The exclusion says that running the check would crash or hang the process."""


class TimeLimitError(Failed):
    """A check took too long. Not an ``Exception``: a backend that catches everything must not swallow it."""


class CannotInstallError(Exception):
    """The backend cannot run on this machine: a result, not a failure."""


class DeclarationError(Exception):
    """A declaration of the backend is, or has become, false: a failure that no exclusion covers."""
