"""What ends a check other than passing or an assertion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.outcomes import Failed, Skipped
else:  # the public names, which type checkers take for variables
    Failed, Skipped = pytest.fail.Exception, pytest.skip.Exception

__all__ = [
    "CannotInstallError",
    "DeclarationError",
    "ExcludedWithoutRun",
    "Failed",
    "NotClaimed",
    "Skipped",
    "TimeLimitError",
]


class NotClaimed(Skipped):
    """The backend does not claim what a check tests. The only skip that needs no exclusion."""


class ExcludedWithoutRun(Skipped):
    """The exclusion says that running the check would crash or hang the process."""


class TimeLimitError(Failed):
    """A check took too long. No ``Exception``: a backend that catches everything must not swallow it."""


class CannotInstallError(Exception):
    """The backend cannot run on this machine: a result, not a failure."""


class DeclarationError(Exception):
    """What the backend declared is not true (any more): a failure that no exclusion covers."""
