"""The GGUF files of a request: fetched or converted, and their headers checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import LlamaFileType
from polydraft.checkpoints.compatibility import check_pair, check_target
from polydraft.checkpoints.config import checkpoint_dtype
from polydraft.checkpoints.contents import content_digest
from polydraft.checkpoints.gguf import GgufHeader, read_header
from polydraft.checkpoints.gguf_config import check_is_model, config_of
from polydraft.checkpoints.gguf_files import fetch_gguf, parts_of
from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan
from polydraft.errors import InvalidRequestError, ModelFormatError, PairMismatchError
from polydraft.hardware import cpu_dtype, free_memory

from polydraft_gguf.conversion.cache import converted
from polydraft_gguf.conversion.checkpoint import Checkpoint
from polydraft_gguf.conversion.write import WeightType, why_not
from polydraft_gguf.headers import check_header

__all__ = ["GgufFile", "code", "fetch_pair", "refusal"]

_WEIGHTS: dict[str, WeightType] = {
    "float32": "f32",
    "fp32": "f32",
    "f32": "f32",
    "float16": "f16",
    "fp16": "f16",
    "f16": "f16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "q8_0": "q8_0",
}
_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file on this machine, and its header."""

    path: Path
    header: GgufHeader
    source: ModelSource
    note: str = ""
    """Why it was converted to this dtype, one sentence for ``RunningInfo.notes``."""

    @property
    def weights(self) -> str:
        """Type of most weights as the file names it: ``f32``, ``q4_k_m``; ``gguf`` if it does not name one."""
        try:
            name: str = LlamaFileType(self.header.metadata["general.file_type"]).name
        except (KeyError, ValueError):
            return "gguf"
        return name.removeprefix("ALL_").removeprefix("MOSTLY_").lower()

    @property
    def bytes(self) -> int:
        """Size of the file; of a split model, of all its parts together."""
        return sum(part.stat().st_size for part in parts_of(self.path))

    @property
    def dtype(self) -> str:
        """``weights`` by numpy's and torch's name, if there is one."""
        return _NAMES.get(self.weights, self.weights)


def fetch_pair(request: LoadRequest, *, on_cpu: bool) -> tuple[GgufFile, GgufFile | None]:
    """Target and drafter, on this machine and checked: llama.cpp would abort the process on a pair that does not fit.

    Args:
        request: The request. ``dtype="auto"`` is a GGUF file's own; that of a checkpoint, which is converted, is its
            own as well, but on CPUs by ``polydraft.hardware.cpu_dtype``.
        on_cpu: This machine's processor computes, and no GPU.

    Raises:
        PairMismatchError: They do not belong together.
        ModelFormatError: A file is missing or damaged, or its architecture does not fit its use.
        InvalidRequestError: The dtype is not the file's.
    """
    plan = request.plan
    choose = _chosen_on_cpu(request) if on_cpu else _own
    target = _fetch(request.target, request, choose)
    check_target(target.source)
    if "tokenizer.ggml.tokens" not in target.header.metadata:
        raise ModelFormatError(
            f"{request.target.id} does not hold a vocabulary.", "Give the GGUF file of a language model."
        )
    if plan.drafter is None:
        return target, None
    drafter = _fetch(plan.drafter, request, choose)
    assert plan.kind is not None
    check_pair(target.source, drafter.source, plan.kind)
    if plan.kind == "mtp" and drafter.header.architecture != "gemma4-assistant":
        raise PairMismatchError(
            f"{plan.drafter.id} has the architecture {drafter.header.architecture!r}; as an MTP drafter, llama.cpp "
            "runs only gemma4-assistant.",
            "Give the target's assistant, or `drafter='ngram'`.",
        )
    return target, drafter


def _own(source: ModelSource) -> tuple[str, str]:
    return checkpoint_dtype(source.config), ""


def _chosen_on_cpu(request: LoadRequest) -> Callable[[ModelSource], tuple[str, str]]:
    """The dtype to convert a checkpoint to, and why; target and drafter share the memory that is free now."""
    both = (request.target, request.plan.drafter)
    folders = [one.path for one in both if one is not None and one.format != "gguf" and one.path is not None]
    free = free_memory()
    return lambda source: cpu_dtype(source.config, folders, free)


def _fetch(source: ModelSource, request: LoadRequest, choose: Callable[[ModelSource], tuple[str, str]]) -> GgufFile:
    note = ""
    if source.format == "gguf":
        path = fetch_gguf(source, request.hub)
    else:
        if source.path is None:
            raise ModelFormatError(
                f"{source.id} is not a GGUF model.", "Load a GGUF file of it: `polydraft pairs` lists published ones."
            )
        dtype, note = choose(source) if request.dtype == "auto" else (request.dtype, "")
        if request.dtype != "auto" and dtype not in _WEIGHTS:
            raise InvalidRequestError(f"`dtype` is {dtype!r}.", f"Give auto, {', '.join(_WEIGHTS)}.")
        path = converted(source.path, _WEIGHTS.get(dtype, "f32"))
    header = read_header(path, source.id)
    check_is_model(header, source.id)
    check_header(header, source.id)
    file = GgufFile(path, header, source.model_copy(update={"config": config_of(header), "path": path}), note)
    if source is request.target and request.dtype != "auto" and source.format == "gguf":
        wanted = _WEIGHTS.get(request.dtype, request.dtype)
        if wanted != file.weights:
            raise InvalidRequestError(
                f"`dtype` is {request.dtype!r}, and the weights of {source.id} are {file.dtype}.",
                "Give `dtype='auto'`, or a GGUF file of that dtype.",
            )
    return file


def refusal(target: ModelSource, plan: SpeculationPlan) -> str | None:
    """Why a model that is not a GGUF file cannot be converted to one, in one sentence; None if it can."""
    for source in (target, plan.drafter):
        if source is None or source.format == "gguf":
            continue
        if source.path is None:
            return f"{source.id} has safetensors weights; load a GGUF file of it (`polydraft pairs` lists some)."
        if reason := why_not(Checkpoint(source.path)):
            return reason
    return None


def code() -> dict[str, str]:
    """This package's code, byte for byte, for a backend's ``build``: it converts, and it asks the server."""
    folder = Path(__file__).parent
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    return {"polydraft-gguf": content_digest(files)}
