"""A data folder of its own for every test, and backends with a defect."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")
sys.path.insert(0, str(Path(__file__).parent))

from polydraft_reference.engine import ReferenceEngine


@pytest.fixture(autouse=True)
def data_home(monkeypatch, tmp_path):
    """Where verifications are kept."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data/polydraft/verified"


@pytest.fixture
def broken(monkeypatch):
    """Give the reference engine a defect."""

    running = ReferenceEngine.running

    def put(sequence_class):
        monkeypatch.setattr(ReferenceEngine, "sequence_class", sequence_class)
        if dtype := getattr(sequence_class, "dtype", None):

            def told(self, request):
                return running(self, request).model_copy(update={"dtype": dtype})

            monkeypatch.setattr(ReferenceEngine, "running", told)

    return put
