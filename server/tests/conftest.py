import sys
from pathlib import Path

import pytest

pytest.importorskip("polydraft_reference", reason="needs polydraft-reference")

sys.path.insert(0, str(Path(__file__).parent))

import polydraft
from scripted import Script, scripted_session
from serving import serving


@pytest.fixture(scope="module")
def toy():
    """A server of the toy, and a session of its own to compare with: (server, session)."""
    load = {"backend": "reference", "isolation": "none", "num_speculative_tokens": 4}
    with polydraft.load("builtin:toy", **load) as session, serving(polydraft.load("builtin:toy", **load)) as server:
        yield server, session


@pytest.fixture
def scripted():
    """Makes a server of a scripted engine: ``with scripted(Script(...), "concurrent", max_waiting=3) as server``."""

    def make(script=None, concurrency="serial", *, target="scripted", **settings):
        return serving(scripted_session(script or Script(), concurrency, target), **settings)

    return make
