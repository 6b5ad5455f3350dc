"""From a defect to a backend class."""

from __future__ import annotations

from polydraft_reference.backend import ReferenceBackend


def liar(sequence=None, *, engine=None, session=None, **capabilities):
    """A reference backend with something changed.

    Args:
        sequence: Class of the engine's sequences.
        engine: Class of the engine.
        session: Class of the session: the core's with a defect, or a whole engine's.
        capabilities: Claims that differ.
    """

    class Liar(ReferenceBackend):
        def capabilities(self):
            return super().capabilities().model_copy(update=capabilities)

        def load_engine(self, request):
            made = super().load_engine(request)
            if engine is not None:
                made.__class__ = engine
            if sequence is not None:
                made.sequence_class = sequence
            return made

        def load(self, request):
            if session is None:
                return super().load(request)
            return session(self.load_engine(request), request, self.capabilities())

    return Liar
