"""The backend's declarations: record, capabilities, exclusions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract import GenerationSettings

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect

if TYPE_CHECKING:
    from polydraft_conformance.suite import Suite

_ALWAYS = frozenset({"max_new_tokens", "stop", "stop_token_ids", "ignore_eos"})
"""Settings that every backend must support: they are not claims."""


@check(scope="backend")
def test_diagnosis_names_engine_and_device(polydraft_suite: Suite) -> None:
    """A usable backend names its engine's version and at least one device.

    Proves: A result of this run can be assigned to a version of the engine and to a device.
    A failure means: `diagnose()` lists no device, or no engine version.
    Look at: The `Diagnosis` that `Backend.diagnose` returns: `engine_version`, and `devices`, with at least one
    `DeviceRecord`.
    """
    diagnosis = polydraft_suite.diagnosis
    expect(bool(diagnosis.engine_version), "diagnose() gives no engine version.")
    expect(bool(diagnosis.devices), "diagnose() gives no device.")


@check(scope="backend")
def test_capabilities_agree_with_the_record(polydraft_suite: Suite) -> None:
    """Capabilities claim no drafter kind that the record lacks, and only settings that exist.

    Proves: What polydraft knows before it imports the backend agrees with what the backend says itself.
    A failure means: `capabilities()` claims a drafter kind that `BackendRecord.drafter_kinds` does not list, or a
    setting that polydraft does not have.
    Look at: `Backend.capabilities`, and the `BackendRecord` that the hook `polydraft_backends` yields.
    """
    capabilities, record = polydraft_suite.capabilities, polydraft_suite.record
    assert capabilities is not None
    more = capabilities.drafter_kinds - record.drafter_kinds
    expect(not more, f"capabilities() claims drafter kinds that the record does not name: {', '.join(sorted(more))}.")
    unknown = capabilities.sampling - (set(GenerationSettings.model_fields) - _ALWAYS)
    expect(not unknown, f"capabilities() claims sampling settings that do not exist: {', '.join(sorted(unknown))}.")


@check(scope="backend")
def test_exclusions_are_well_formed(polydraft_suite: Suite) -> None:
    """Every exclusion names checks of this suite, and notyet ones bring a probe.

    Proves: No exclusion is silently without effect, and every upstream fault has a probe that will show when it is
    gone.
    A failure means: An exclusion's pattern matches no check of this version of the suite, or its status and its probe
    do not go together.
    Look at: `Backend.conformance_exclusions`. `polydraft-conformance explain` lists the names of all checks.
    """
    faults = polydraft_suite.exclusions.faults()
    expect(not faults, "\n".join(faults))
