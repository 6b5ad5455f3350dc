"""Sessions over the reference engine whose calls are serial or concurrent, and an engine that can be held."""

import threading

import pytest


class Gate:
    """Holds the engine before a step until the gate is opened."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()

    def shut(self):
        self.waiting.clear()
        self.open.clear()

    def pass_through(self):
        if not self.open.is_set():
            self.waiting.set()
            assert self.open.wait(30)


@pytest.fixture
def make_session():
    """Makes sessions: ``concurrency``, and a ``gate`` that every target step passes."""
    reference = pytest.importorskip("polydraft_reference.backend", reason="needs polydraft-reference")
    from polydraft._session.session import Session
    from polydraft_reference.sequence import ReferenceSequence
    from polydraft_reference.toys import toy_request

    made = []

    def make(concurrency="serial", gate=None, kind="mtp"):
        class Gated(ReferenceSequence):
            def verify(self, token_ids, sampler, *, keep_logits=False):
                if gate is not None:
                    gate.pass_through()
                return super().verify(token_ids, sampler, keep_logits=keep_logits)

        request = toy_request(kind)
        engine = backend.load_engine(request)

        engine.running = engine.running.model_copy(update={"concurrency": concurrency})
        engine.sequence_class = Gated
        session = Session(engine, engine.running, backend.capabilities())
        made.append(session)
        return session

    backend = reference.ReferenceBackend()
    yield make
    for session in made:
        session.close()


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.open.set()
