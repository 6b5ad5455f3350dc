"""What tests of workers share: the scripted backend's record and request, and whether a process runs."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from polydraft.contract import BackendRecord, LoadRequest, ModelSource, SpeculationPlan

RECORD = BackendRecord(
    name="scripted",
    factory="worker_backends:Scripted",
    summary="a script",
    formats={"none"},
    drafter_kinds={"ngram"},
    engine="script",
    install_hint="pip install script",
)


def scripted_request(backend, **options):
    plan = SpeculationPlan(kind="ngram", num_speculative_tokens=2, chosen_by="caller")
    target = ModelSource(id="letters", kind="local", format="none")
    model = backend.options.model_validate(options)
    return LoadRequest(backend="scripted", target=target, plan=plan, engine_options=model)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    if sys.platform.startswith("linux"):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def wait_until(condition, seconds=15.0):
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
