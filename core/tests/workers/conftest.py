"""Sessions whose engine, a scripted one, is in a worker."""

import os
import signal
from contextlib import suppress

import pytest
from polydraft._load import open_session
from polydraft._workers.backend import WorkerBackend
from worker_helpers import RECORD, alive, scripted_request, wait_until


@pytest.fixture(scope="module")
def backend():
    made = WorkerBackend(RECORD, reason="A test asked for it.")
    yield made
    made.release()


@pytest.fixture
def load(backend):
    """Loads sessions; all of them are closed."""
    made = []

    def make(**options):
        made.append(open_session(backend, scripted_request(backend, **options)))
        return made[-1]

    yield make
    for session in made:
        pid = session.running.process_id
        session.close()
        assert wait_until(lambda pid=pid: not alive(pid)), "a worker outlives its session"


@pytest.fixture(scope="module")
def session(backend):
    """One session for tests that leave it as it was."""
    made = open_session(backend, scripted_request(backend))
    yield made
    pid = made.running.process_id
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    made.close()
    assert not alive(pid)
