"""Backends for tests of the suite: the reference engine, as it is and with something changed."""

from __future__ import annotations

import pytest
from polydraft import PluginHost

pytest.importorskip("polydraft_reference", reason="the suite is tested on the reference engine: polydraft-reference")


@pytest.fixture
def conformance(tmp_path):
    """Runs the suite, in this process, on a backend class (default: the reference backend)."""
    from polydraft_conformance.defects.making import PluginOf
    from polydraft_conformance.testing import run_in_process
    from polydraft_reference.backend import ReferenceBackend

    def run(*arguments, backend=ReferenceBackend, name="reference", quick=True, **record):
        host = PluginHost({"tested": PluginOf(backend, name=name, **record)})
        # A busy machine is not a defect of the backend: the limit is for what hangs.
        usual = ["--polydraft-time-limit", "600", *["--polydraft-quick"] * quick]
        if "--polydraft-seed" not in arguments:
            usual += ["--polydraft-seed", "5"]
        return run_in_process(name, *usual, *arguments, host=host, rootdir=tmp_path)

    return run
