"""The control's probabilities."""

import pytest
from polydraft_conformance.control import chance_of_at_least


def test_poisson_binomial():
    assert chance_of_at_least(0, []) == 1.0
    assert chance_of_at_least(1, [0.0, 0.0]) == 0.0
    assert chance_of_at_least(2, [0.5, 0.5]) == pytest.approx(0.25)
    assert chance_of_at_least(1, [0.2, 0.5, 1.0]) == pytest.approx(1.0)
    assert chance_of_at_least(2, [0.2, 0.5, 0.1]) == pytest.approx(0.2 * 0.5 + 0.2 * 0.1 + 0.5 * 0.1 - 2 * 0.01)
