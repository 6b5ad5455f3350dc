"""A stand-in for the server, and a folder for caches of this run only."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the module next to this file

from ollama_stand_in import StandIn


@pytest.fixture
def server(monkeypatch):
    with StandIn() as running:
        monkeypatch.setenv("OLLAMA_HOST", running.host)
        yield running


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYDRAFT_LLAMA_CPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield
