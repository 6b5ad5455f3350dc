"""From a defect to a backend class, and to a plugin that brings it."""

from __future__ import annotations

import sys
from types import ModuleType

from polydraft.contract import hookimpl
from polydraft_reference.backend import ReferenceBackend


def defective(sequence=None, *, whole=None, dtype=None, **capabilities):
    """A reference backend with something changed.

    Args:
        sequence: Class of the engine's sequences.
        whole: Class of a whole engine, which is given the reference engine.
        dtype: What the engine says that it runs in.
        capabilities: Claims that differ.
    """

    class Defective(ReferenceBackend):
        def capabilities(self):
            return super().capabilities().model_copy(update=capabilities)

        def load_engine(self, request):
            engine = super().load_engine(request)
            if sequence is not None:
                engine.sequence_class = sequence
            if dtype is not None:
                engine.running = engine.running.model_copy(update={"dtype": dtype})
            return engine if whole is None else whole(engine)

    return Defective


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
