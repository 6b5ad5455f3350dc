"""Backends for tests of the suite: the reference engine, as it is and with something changed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from polydraft.contract import hookimpl
from polydraft.plugins import PluginHost

pytest.importorskip("polydraft_reference", reason="the suite is tested on the reference engine: polydraft-reference")

sys.path.insert(0, str(Path(__file__).parent))  # for conformance_liars: tests are imported by their files


class PluginOf:
    """A polydraft plugin with the reference plugin's models and one backend of its own."""

    def __init__(self, backend_class, **record):
        module = ModuleType("conformance_test_backend")
        module.Backend = backend_class
        sys.modules[module.__name__] = module
        self.record = {"factory": f"{module.__name__}:Backend", **record}

    @hookimpl
    def polydraft_backends(self):
        from polydraft_reference import plugin

        for record in plugin.polydraft_backends():
            yield record.model_copy(update=self.record)

    @hookimpl
    def polydraft_local_models(self):
        from polydraft_reference import plugin

        yield from plugin.polydraft_local_models()

    @hookimpl
    def polydraft_pairs(self):
        from polydraft_reference import plugin

        yield from plugin.polydraft_pairs()


@pytest.fixture
def conformance(tmp_path):
    """Runs the suite, in this process, on a backend class (default: the reference backend)."""
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
