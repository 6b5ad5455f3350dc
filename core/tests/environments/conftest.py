"""An empty data folder, and a stand-in for uv."""

import os
import sys
from pathlib import Path

import pytest
from polydraft._environments.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))  # for ``stand_ins``

from stand_ins import FakeUv, be_quick


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder."""
    folder = tmp_path / "data"
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def uv(tmp_path, data, monkeypatch):
    """The stand-in, first on the PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    fake = FakeUv(folder)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("UV_INDEX", "none")  # pip's settings are not asked for
    return fake


@pytest.fixture
def silent():
    return Progress(None, None)


@pytest.fixture
def quick(monkeypatch):
    """Nothing is started in the environments that the stand-in makes."""
    be_quick(monkeypatch.setattr)
