"""From a load request to a loaded pair: files, device, dtype, memory, models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from polydraft.checkpoints.config import eos_token_ids
from polydraft.checkpoints.fetch import fetch
from polydraft.checkpoints.safetensors import weight_files
from polydraft.contract import LoadRequest, ModelSource, Tokenizer
from polydraft.errors import (
    ContextLengthError,
    DeviceError,
    InvalidRequestError,
    ModelFormatError,
    OutOfMemoryError,
    UnsupportedError,
)
from polydraft.text.hub_tokenizer import HubTokenizer
from polydraft.text.ids_only import IdsOnlyTokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from polydraft_transformers.decoder import Decoder
from polydraft_transformers.engine import TransformersEngine
from polydraft_transformers.fixed_rows import check_rows, fixed_rows
from polydraft_transformers.mtp import MtpDrafter

__all__ = ["available_memory", "load_pair"]

_PATTERNS = ("*.json", "*.jinja", "*.safetensors", "tokenizer*")
_OLD_TOKENIZERS = ("vocab.json", "merges.txt", "spiece.model")
"""Files of tokenizers whose names do not say so."""
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def load_pair(request: LoadRequest) -> TransformersEngine:
    """Load target and drafter.

    Raises:
        DeviceError: The device is not there.
        OutOfMemoryError: The weights do not fit into the free memory.
        ModelFormatError: A file is missing or damaged, or the architecture unknown.
        InvalidRequestError: Unknown dtype or device, or a context longer than the model's.
    """
    device = _device(request.device)
    dtype = _dtype(request)
    options = request.engine_options
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    target_path = fetch(request.target, request.hub, patterns=_PATTERNS)
    plan = request.plan
    drafter_path = fetch(plan.drafter, request.hub, patterns=_PATTERNS) if plan.drafter is not None else None
    _check_memory([path for path in (target_path, drafter_path) if path is not None], dtype, device)
    k = plan.num_speculative_tokens
    fixed = request.exactness == "bitwise"
    experts = _experts(request, dtype, device)
    target = Decoder(
        _model(request.target, target_path, request, dtype, device, experts),
        fixed_rows(k) if fixed else k + 1,
        fixed=fixed,
    )
    drafter: MtpDrafter | Decoder | None = None
    if plan.drafter is not None and drafter_path is not None:
        loaded = _model(plan.drafter, drafter_path, request, dtype, device, experts)
        drafter = MtpDrafter(loaded, target) if plan.kind == "mtp" else Decoder(loaded, k + 1)
    if fixed:
        check_rows(target)
    context = _context_length(request, target.config)
    return TransformersEngine(
        target, drafter, _tokenizer(target_path, request, int(target.config.vocab_size)), request, context
    )


def _experts(request: LoadRequest, dtype: torch.dtype, device: torch.device) -> str | None:
    """How mixtures of experts run.

    Of the ways in float32, only ``batched_mm`` keeps a row apart from its neighbours on CPUs, and only it can be
    captured on GPUs (torch's grouped_mm asks the host for the groups' ends).
    """
    named: str | None = request.engine_options.experts_implementation
    if dtype == torch.float32 and (request.exactness == "bitwise" or device.type == "cuda"):
        return named or "batched_mm"
    return named


def available_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequestError(f"{name!r} is no device.", "Give auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"The device {name} was asked for, and torch {torch.__version__} sees {torch.cuda.device_count()} GPUs.",
            "Use device='cpu', or install a CUDA build of torch (`polydraft doctor` shows the devices).",
        )
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"The transformers backend has not been tried on {device.type}.", "Use device='cpu' or 'cuda'."
        )
    return device


def _dtype(request: LoadRequest) -> torch.dtype:
    if request.dtype == "auto":
        text = request.target.config.get("text_config") or {}
        config = request.target.config
        named = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"
        return _DTYPES.get(str(named).removeprefix("torch."), torch.float32)
    if request.dtype not in _DTYPES:
        raise InvalidRequestError(f"dtype is {request.dtype!r}.", f"Give auto, {', '.join(_DTYPES)}.")
    return _DTYPES[request.dtype]


def _check_memory(folders: Iterable[Path], dtype: torch.dtype, device: torch.device) -> None:
    # Checkpoints are stored in 2-byte floats as a rule; loading in float32 doubles them.
    factor = 2 if dtype == torch.float32 else 1
    needed = factor * sum(file.stat().st_size for folder in folders for file in weight_files(folder))
    free = available_memory(device)
    if needed > free:
        raise OutOfMemoryError(
            f"The weights need about {needed / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free.",
            "Choose a smaller model, or dtype='bfloat16'.",
        )


def _model(
    source: ModelSource, path: Path, request: LoadRequest, dtype: torch.dtype, device: torch.device, experts: str | None
) -> Any:
    names = source.config.get("architectures") or []
    conditional = any(name.endswith("ForConditionalGeneration") for name in names)
    loader = AutoModelForImageTextToText if conditional else AutoModelForCausalLM
    text_config = source.config.get("text_config") or source.config
    # Transformers refuses the setting where there are no experts, assistants of mixtures among them.
    mixture = any(text_config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    extra = {"experts_implementation": experts} if experts and mixture else {}
    try:
        if source.model_type.endswith("_assistant"):
            loader = AutoModelForCausalLM
        with _quietly():
            model: Any = loader.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=request.trust_remote_code,
                local_files_only=True,
                **extra,
            )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ModelFormatError(
            f"Transformers cannot load {source.id}: {_first_line(error)}",
            "Check that the checkpoint is complete and its architecture known to the installed version.",
        ) from error
    model.to(device=device)
    return model.eval()


def _tokenizer(path: Path, request: LoadRequest, vocab_size: int) -> Tokenizer:
    ends = eos_token_ids(request.target.config, path)
    if not any(path.glob("*token*")) and not any((path / name).exists() for name in _OLD_TOKENIZERS):
        return IdsOnlyTokenizer(vocab_size, eos_token_ids=ends, bos_token_id=request.target.config.get("bos_token_id"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=request.trust_remote_code
        )
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        raise ModelFormatError(
            f"Transformers cannot load the tokenizer of {request.target.id}: {_first_line(error)}",
            "Check that tokenizer.json is there and complete.",
        ) from error
    return HubTokenizer(tokenizer, eos_token_ids=ends, vocab_size=vocab_size)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars that Transformers draws for weights already on this machine."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def _context_length(request: LoadRequest, config: Any) -> int:
    own = int(getattr(config, "max_position_embeddings", 0) or 4096)
    if request.context_length is None:
        return own
    if request.context_length > own:
        raise ContextLengthError(
            f"context_length is {request.context_length}, and {request.target.id} was made for {own} tokens.",
            f"Give at most {own}.",
        )
    return request.context_length
