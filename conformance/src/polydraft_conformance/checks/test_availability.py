"""Can the backend run here, and does it describe itself consistently?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.signals import CannotInstallError

if TYPE_CHECKING:
    from polydraft_conformance.suite import Suite


@check(scope="backend")
def test_backend_can_run_here(polydraft_suite: Suite) -> None:
    """The backend says that it is usable on this machine; if not, its reason and remedy are the result.

    Proves: The rest of the run says something about this machine. The suite reads `diagnose()` and loads nothing.
    A failure means: `diagnose()` says that the backend cannot run, and gives no reason or no remedy; or it cannot run
    here, and `--polydraft-must-run` was given.
    Look at: `Backend.diagnose`, and the specifiers in `BackendRecord.requires`, which the core checks first. `polydraft
    doctor` prints the same diagnosis.
    """
    diagnosis = polydraft_suite.diagnosis
    if diagnosis.usable:
        return
    expect(bool(diagnosis.reason), "diagnose() says that the backend is not usable, but gives no reason.")
    expect(bool(diagnosis.remedy), "diagnose() says that the backend is not usable, but gives no remedy.")
    said = f"{diagnosis.reason} {diagnosis.remedy}"
    expect(
        not polydraft_suite.options.must_run, f"The backend cannot run here, and --polydraft-must-run was given: {said}"
    )
    raise CannotInstallError(said)
