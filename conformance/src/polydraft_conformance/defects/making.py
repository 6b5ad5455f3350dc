"""From a defect to a backend class, and to a plugin that brings it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from polydraft.contract import (
    Backend,
    BackendRecord,
    Capabilities,
    LoadRequest,
    LocalModelRecord,
    MatmulPrecision,
    PairRecord,
    SteppingEngine,
    WholeEngine,
    hookimpl,
)
from polydraft_reference import plugin as reference_plugin
from polydraft_reference.backend import ReferenceBackend
from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.sequence import ReferenceSequence

__all__ = ["PluginOf", "defective"]


def defective(
    sequence: type[ReferenceSequence] | None = None,
    *,
    whole: Callable[[ReferenceEngine], WholeEngine] | None = None,
    dtype: str | None = None,
    matmul_precision: MatmulPrecision | None = None,
    **capabilities: Any,
) -> type[Backend]:
    """A reference backend with something changed.

    Args:
        sequence: Class of the engine's sequences.
        whole: Class of a whole engine, which is given the reference engine.
        dtype: What the engine says that it runs in.
        matmul_precision: What it says of its matrix products.
        capabilities: Claims that differ.
    """

    class Defective(ReferenceBackend):
        def capabilities(self) -> Capabilities:
            return super().capabilities().model_copy(update=capabilities)

        def load_engine(self, request: LoadRequest) -> SteppingEngine | WholeEngine:  # type: ignore[override]
            engine = super().load_engine(request)
            if sequence is not None:
                engine.sequence_class = sequence
            said = {"dtype": dtype, "matmul_precision": matmul_precision}
            changed = {name: value for name, value in said.items() if value is not None}
            engine.running = engine.running.model_copy(update=changed)
            return engine if whole is None else whole(engine)

    return Defective


class PluginOf:
    """A polydraft plugin with the reference plugin's models and one backend of its own."""

    def __init__(self, backend_class: type[Backend], **record: Any) -> None:
        module = ModuleType("polydraft_conformance_defective_backend")
        module.Backend = backend_class  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        self.record = {"factory": f"{module.__name__}:Backend", **record}

    @hookimpl
    def polydraft_backends(self) -> Iterable[BackendRecord]:
        """The reference plugin's record, changed."""
        for record in reference_plugin.polydraft_backends():
            yield record.model_copy(update=self.record)

    @hookimpl
    def polydraft_local_models(self) -> Iterable[LocalModelRecord]:
        """The reference plugin's models."""
        yield from reference_plugin.polydraft_local_models()

    @hookimpl
    def polydraft_pairs(self) -> Iterable[PairRecord]:
        """The reference plugin's pairs."""
        yield from reference_plugin.polydraft_pairs()
