"""Separate folders for every test."""

import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")


@pytest.fixture(autouse=True)
def cache_home(monkeypatch, tmp_path, clean_environment):
    """Where digests are kept."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
