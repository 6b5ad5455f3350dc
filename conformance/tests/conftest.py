"""Backends for tests of the suite: the reference engine, as it is and with something changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from polydraft._plugins import PluginHost

pytest.importorskip("polydraft_reference", reason="the suite is tested on the reference engine: polydraft-reference")

sys.path.insert(0, str(Path(__file__).parent))  # for conformance_liars: tests are imported by their files


@pytest.fixture
def conformance(tmp_path):
    """Runs the suite, in this process, on a backend class (default: the reference backend)."""
    from conformance_liars.making import PluginOf
    from polydraft_conformance.testing import run_in_process
    from polydraft_reference.backend import ReferenceBackend

    def run(*arguments, backend=ReferenceBackend, name="reference", quick=True, **record):
        host = PluginHost({"tested": PluginOf(backend, name=name, **record)})
        # Busy machines are no defect of a backend: the limit is for what hangs.
        usual = ["--polydraft-time-limit", "600", *["--polydraft-quick"] * quick]
        return run_in_process(name, *usual, *arguments, host=host, rootdir=tmp_path)

    return run


@pytest.fixture
def mutant():
    """Makes a backend class whose engine opens sequences of a class with a defect."""
    from polydraft_reference.backend import ReferenceBackend

    def make(sequence_class, **attributes):
        def load_engine(self, request):
            engine = ReferenceBackend.load_engine(self, request)
            engine.sequence_class = sequence_class
            return engine

        return type("Mutant", (ReferenceBackend,), {"load_engine": load_engine, **attributes})

    return make
