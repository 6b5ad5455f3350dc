"""The fixtures of checks. All names begin with ``polydraft``.

Nothing is imported until a check asks: this module is loaded by every pytest run where the suite is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from polydraft_conformance.bench import Bench
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = ["polydraft_bench", "polydraft_case", "polydraft_suite"]


@pytest.fixture(scope="session")
def polydraft_suite(pytestconfig: pytest.Config) -> Suite:
    """The run: options, capabilities, pairs. For checks of scope ``backend``, which load nothing."""
    from polydraft_conformance.plugin import suite_of

    return suite_of(pytestconfig)


@pytest.fixture
def polydraft_case() -> Case:
    """The target, drafter and k that a check runs on; given by the check's scope."""
    raise pytest.UsageError("A check that uses polydraft_bench needs a scope other than 'backend'.")


@pytest.fixture
def polydraft_bench(request: pytest.FixtureRequest, polydraft_suite: Suite, polydraft_case: Case) -> Bench:
    """The loaded session of the case, with all that checks need; checks of one case share the session."""
    from polydraft_conformance.bench import Bench
    from polydraft_conformance.plugin import NUMBERS

    return Bench(polydraft_suite, polydraft_case, polydraft_suite.session(polydraft_case), request.node.stash[NUMBERS])
