"""A separate data folder for every test."""

import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")


@pytest.fixture(autouse=True)
def data_home(monkeypatch, tmp_path):
    """Where verifications are kept."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data/polydraft/verified"
