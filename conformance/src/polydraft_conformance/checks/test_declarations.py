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
    """A usable backend names its engine's version and at least one device."""
    diagnosis = polydraft_suite.diagnosis
    expect(bool(diagnosis.engine_version), "diagnose() gives no engine version.")
    expect(bool(diagnosis.devices), "diagnose() gives no device.")


@check(scope="backend")
def test_capabilities_agree_with_the_record(polydraft_suite: Suite) -> None:
    """Capabilities claim no drafter kind that the record lacks, and only settings that exist."""
    capabilities, record = polydraft_suite.capabilities, polydraft_suite.record
    assert capabilities is not None
    more = capabilities.drafter_kinds - record.drafter_kinds
    expect(not more, f"capabilities() claims drafter kinds that the record does not name: {', '.join(sorted(more))}.")
    unknown = capabilities.sampling - (set(GenerationSettings.model_fields) - _ALWAYS)
    expect(not unknown, f"capabilities() claims sampling settings that do not exist: {', '.join(sorted(unknown))}.")


@check(scope="backend")
def test_exclusions_are_well_formed(polydraft_suite: Suite) -> None:
    """Every exclusion names checks of this suite, and notyet ones bring a probe."""
    faults = polydraft_suite.exclusions.faults()
    expect(not faults, "\n".join(faults))
