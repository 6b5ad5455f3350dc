"""From a load request to a loaded pair: the configs checked, then the weights made."""

from __future__ import annotations

from importlib.metadata import version

from polydraft.contract import LoadRequest, ModelSource, RunningInfo
from polydraft.engine_parts import context_length
from polydraft.errors import DeviceError, PairMismatchError, UnsupportedError

from polydraft_reference.config import MODEL_TYPE, AssistantConfig, ModelConfig, read_config
from polydraft_reference.drafters.mtp import AssistantDrafter
from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.model import ReferenceModel
from polydraft_reference.options import ReferenceOptions

__all__ = ["load_pair"]


def load_pair(request: LoadRequest) -> ReferenceEngine:
    """Make the weights of target and drafter.

    Raises:
        ModelFormatError: A config.json is not a toy model's.
        PairMismatchError: The assistant belongs to a target of another width.
        UnsupportedError: A dtype other than float32 and float64.
        DeviceError: A device other than the CPU.
        ContextLengthError: The model's context is shorter than ``context_length``.
    """
    if request.device not in {"auto", "cpu"}:
        raise DeviceError(f"The reference engine has no device {request.device!r}.", "Use `device='cpu'`.")
    if request.dtype not in {"auto", "float32", "float64"}:
        raise UnsupportedError(f"The reference engine has no dtype {request.dtype!r}.", "Use float32 or float64.")
    dtype = "float32" if request.dtype == "auto" else request.dtype
    config = read_config(ModelConfig, request.target.config, request.target.id)
    running = RunningInfo.of(
        request,
        engine="polydraft-reference",
        engine_version=version("polydraft-reference"),
        dtype=dtype,
        device="cpu",
        context_length=context_length(request, longest=config.max_position_embeddings),
        concurrency="concurrent",
    )
    target = ReferenceModel(config, dtype)
    drafter = request.plan.drafter
    if drafter is None:
        return ReferenceEngine(target, None, running)
    if drafter.model_type == MODEL_TYPE:
        draft_model = ReferenceModel(read_config(ModelConfig, drafter.config, drafter.id), dtype)
        return ReferenceEngine(target, draft_model, running)
    return ReferenceEngine(target, _assistant(request, drafter, target), running)


def _assistant(request: LoadRequest, source: ModelSource, target: ReferenceModel) -> AssistantDrafter:
    config = read_config(AssistantConfig, source.config, source.id)
    if config.backbone_hidden_size != target.config.hidden_size:
        raise PairMismatchError(
            f"{source.id} is an assistant for a target of width {config.backbone_hidden_size}, "
            f"but {request.target.id} has {target.config.hidden_size}.",
            "Choose the assistant that was made for this target.",
        )
    options = request.engine_options or ReferenceOptions()
    agreement = config.agreement if options.agreement is None else options.agreement
    return AssistantDrafter(target, agreement, config.seed)
