"""Separate folders for every test, and engines that are slow on purpose."""

import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")


@pytest.fixture(autouse=True)
def data_home(monkeypatch, tmp_path, clean_environment):
    """Where tunings are kept."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data/polydraft/tuned"
