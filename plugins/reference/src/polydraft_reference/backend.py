"""The backend: what it can do, and which models it refuses."""

from __future__ import annotations

from importlib.metadata import version

from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    LoadRequest,
    ModelSource,
    SpeculationPlan,
)
from polydraft.errors import UnsupportedError

from polydraft_reference.config import ASSISTANT_TYPE, MODEL_TYPE
from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.loading import load_pair
from polydraft_reference.options import ReferenceOptions

__all__ = ["ReferenceBackend"]

_MAX_DRAFT_TOKENS = 16
_DRAFTER_TYPES = {"mtp": ASSISTANT_TYPE, "draft-model": MODEL_TYPE}


class ReferenceBackend(Backend):
    """Loads the toy models, for tests and for reading."""

    options = ReferenceOptions

    def capabilities(self) -> Capabilities:
        """Everything that the core's loop offers; ``model`` says why ``bitwise`` can be claimed."""
        return Capabilities(
            drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
            exactness=frozenset({"standard", "bitwise"}),
            seed_identical=True,
            exposes_logits=True,
            reuses_prefixes=True,
            concurrent_calls=True,
            max_speculative_tokens=_MAX_DRAFT_TOKENS,
        )

    def diagnose(self) -> Diagnosis:
        """Always usable: it needs only numpy."""
        return Diagnosis(
            usable=True,
            engine_version=version("polydraft-reference"),
            devices=(DeviceRecord(name="cpu", description="numpy"),),
            notes=("Toy models only: for tests and plugin authors.",),
            rank=1,  # the toy models have no other backend
            depends_on=(),
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Refuse models other than toys, and drafters of another kind than was asked for."""
        if target.model_type != MODEL_TYPE:
            return f"The reference engine runs toy models of type {MODEL_TYPE}, not {target.model_type or 'unknown'}."
        if plan.drafter is not None and plan.drafter.model_type != (wanted := _DRAFTER_TYPES.get(plan.kind or "")):
            return f"A toy drafter of kind {plan.kind} is of type {wanted}, not {plan.drafter.model_type or 'unknown'}."
        return None

    def load_engine(self, request: LoadRequest) -> ReferenceEngine:
        """Refuse what the core refuses too, for tests that make their own requests; then load the pair."""
        if reason := self.refuse(request.target, request.plan):
            raise UnsupportedError(reason, "Load builtin:toy, or use another backend.")
        if request.plan.max_draft_tokens > _MAX_DRAFT_TOKENS:
            raise UnsupportedError(
                f"`num_speculative_tokens={request.plan.max_draft_tokens}` is too large.",
                f"The reference engine drafts at most {_MAX_DRAFT_TOKENS} tokens per round.",
            )
        return load_pair(request)
