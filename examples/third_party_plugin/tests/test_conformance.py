"""The whole suite, on both backends."""

import pytest
from polydraft_conformance.testing import assert_conforms


@pytest.mark.parametrize("backend", ["markov", "markov-whole"])
def test_conformance(backend: str) -> None:
    assert_conforms(backend, "--polydraft-report", f"conformance-reports/{backend}")
