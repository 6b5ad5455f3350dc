"""The fixtures of checks. All names begin with ``polydraft``.

Nothing is imported until a check asks: this module is loaded by every pytest run where the suite is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from polydraft import Session

    from polydraft_conformance.evidence import Evidence
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = ["polydraft_case", "polydraft_evidence", "polydraft_numbers", "polydraft_session", "polydraft_suite"]


@pytest.fixture(scope="session")
def polydraft_suite(pytestconfig: pytest.Config) -> Suite:
    """The run: options, capabilities, pairs."""
    from polydraft_conformance.plugin import suite_of

    return suite_of(pytestconfig)


@pytest.fixture
def polydraft_case() -> Case:
    """The target, drafter and k that a check runs on; given by the check's scope."""
    raise pytest.UsageError("A check that uses polydraft_case needs a scope other than 'backend'.")


@pytest.fixture
def polydraft_session(polydraft_suite: Suite, polydraft_case: Case) -> Session:
    """The loaded session of the case; checks of one case share it."""
    return polydraft_suite.session(polydraft_case)


@pytest.fixture
def polydraft_evidence(polydraft_suite: Suite, polydraft_case: Case) -> Evidence:
    """The greedy outputs of the case, plain and speculative, made once."""
    from polydraft_conformance.evidence import evidence

    return evidence(polydraft_suite, polydraft_case)


@pytest.fixture
def polydraft_numbers(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a check puts here is in its row of the report."""
    from polydraft_conformance.plugin import NUMBERS

    numbers: dict[str, Any] = request.node.stash[NUMBERS]
    return numbers
