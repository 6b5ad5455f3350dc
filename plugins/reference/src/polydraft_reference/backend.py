"""The backend: from a load request to an engine."""

from __future__ import annotations

from importlib.metadata import version

from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    EngineOptions,
    LoadRequest,
    ModelSource,
    RunningInfo,
    SpeculationPlan,
)
from polydraft.engines import context_length
from polydraft.errors import DeviceError, PairMismatchError, UnsupportedError
from pydantic import Field

from polydraft_reference.config import ASSISTANT_TYPE, MODEL_TYPE, AssistantConfig, ModelConfig, read_config
from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.model import ReferenceModel

__all__ = ["ReferenceBackend", "ReferenceOptions"]

_MAX_DRAFT_TOKENS = 16
_DRAFTER_TYPES = {"mtp": ASSISTANT_TYPE, "draft-model": MODEL_TYPE}


class ReferenceOptions(EngineOptions):
    """``load(..., engine_options={"agreement": 0.5})``."""

    agreement: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Share of positions at which a toy assistant drafts what the "
        "target will choose, in place of the checkpoint's own.",
    )


class ReferenceBackend(Backend):
    """Loads the toy models. Made for tests and for reading; it never wins ``backend="auto"`` by its rank."""

    options = ReferenceOptions

    def capabilities(self) -> Capabilities:
        """Everything that the core's loop offers; see ``model`` for why ``bitwise`` can be claimed."""
        return Capabilities(
            drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
            exactness=frozenset({"standard", "bitwise"}),
            seed_identical=True,
            exposes_logits=True,
            concurrent_calls=True,
            max_speculative_tokens=_MAX_DRAFT_TOKENS,
        )

    def diagnose(self) -> Diagnosis:
        """Always usable: numpy is all it needs."""
        return Diagnosis(
            usable=True,
            engine_version=version("polydraft-reference"),
            devices=(DeviceRecord(name="cpu", description="numpy"),),
            notes=("Toy models only: for tests and plugin authors.",),
            rank=0,
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why a checkpoint is not a toy, or its drafter not a drafter for it."""
        if target.model_type != MODEL_TYPE:
            return f"The reference engine runs toy models of type {MODEL_TYPE}, not {target.model_type or 'unknown'}."
        if plan.drafter is not None and plan.drafter.model_type != (wanted := _DRAFTER_TYPES.get(plan.kind or "")):
            return f"A toy drafter of kind {plan.kind} is of type {wanted}, not {plan.drafter.model_type or 'unknown'}."
        return None

    def load_engine(self, request: LoadRequest) -> ReferenceEngine:
        """Make the weights.

        Raises:
            ModelFormatError: A config.json is not a toy's.
            PairMismatchError: The assistant belongs to a target of another width.
            UnsupportedError: Another dtype than float32 or float64, or too large a k.
            DeviceError: Another device than the CPU.
            ContextLengthError: The model's context is shorter than ``context_length``.
        """
        if reason := self.refuse(request.target, request.plan):
            raise UnsupportedError(reason, "Load builtin:toy, or use another backend.")
        if request.device not in {"auto", "cpu"}:
            raise DeviceError(f"The reference engine has no device {request.device!r}.", "Use device='cpu'.")
        if request.plan.num_speculative_tokens > _MAX_DRAFT_TOKENS:
            raise UnsupportedError(
                f"num_speculative_tokens={request.plan.num_speculative_tokens} is too large.",
                f"The reference engine drafts at most {_MAX_DRAFT_TOKENS} tokens a round.",
            )
        dtype = _dtype(request.dtype)
        config = read_config(ModelConfig, request.target.config, request.target.id)
        drafter = _drafter(request, config)
        running = RunningInfo.of(
            request,
            engine="polydraft-reference",
            engine_version=version("polydraft-reference"),
            dtype=dtype,
            device="cpu",
            context_length=context_length(request, longest=config.max_position_embeddings),
            concurrency="concurrent",
        )
        draft_model = ReferenceModel(drafter, dtype) if isinstance(drafter, ModelConfig) else drafter
        return ReferenceEngine(ReferenceModel(config, dtype), draft_model, running)


def _dtype(name: str) -> str:
    if name not in {"auto", "float32", "float64"}:
        raise UnsupportedError(f"The reference engine has no dtype {name!r}.", "Use float32 or float64.")
    return "float32" if name == "auto" else name


def _drafter(request: LoadRequest, target: ModelConfig) -> AssistantConfig | ModelConfig | None:
    """The drafter's checked config."""
    source = request.plan.drafter
    if source is None:
        return None
    if source.model_type == MODEL_TYPE:
        return read_config(ModelConfig, source.config, source.id)
    assistant = read_config(AssistantConfig, source.config, source.id)
    if assistant.backbone_hidden_size != target.hidden_size:
        raise PairMismatchError(
            f"{source.id} is an assistant for a target of width {assistant.backbone_hidden_size}, "
            f"but {request.target.id} has {target.hidden_size}.",
            "Choose the assistant that was made for this target.",
        )
    options = request.engine_options
    if isinstance(options, ReferenceOptions) and options.agreement is not None:
        return assistant.model_copy(update={"agreement": options.agreement})
    return assistant
