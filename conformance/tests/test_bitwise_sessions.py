"""Sessions with ``exactness="bitwise"`` that a backend refuses."""

from types import SimpleNamespace

import pytest
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft_conformance.bits import bitwise_sessions


def refused(device, error):
    def load(case, **changes):
        raise error("Not measured here.", "Use another device.")

    case = SimpleNamespace(pair="toy")
    suite = SimpleNamespace(options=SimpleNamespace(dtype="float32", device=device), pairs=["toy"], load=load)
    found = {}
    assert list(bitwise_sessions(SimpleNamespace(suite=suite, case=case, quick=True), found)) == []
    return found


def test_a_backend_that_claims_them_has_them_on_the_cpu():
    with pytest.raises(UnsupportedError):
        refused("cpu", UnsupportedError)


def test_it_may_have_measured_no_other_device():
    found = refused("cuda", UnsupportedError)
    assert found.keys() == {"float32", "bfloat16"}
    assert "Not measured here" in found["float32"]


def test_another_error_is_one_on_every_device():
    with pytest.raises(InvalidRequestError):
        refused("cuda", InvalidRequestError)
