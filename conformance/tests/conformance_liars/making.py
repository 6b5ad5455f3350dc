"""From a defect to a backend class, and to a plugin that brings it."""

from __future__ import annotations

import sys
from types import ModuleType

from polydraft.contract import hookimpl
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
