"""From a load request to a loaded pair: files, device, dtype, memory, models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from polydraft.checkpoints.fetch import fetch, has_tokenizer
from polydraft.checkpoints.special_tokens import read_special_tokens
from polydraft.contract import LoadRequest, ModelSource, Tokenizer
from polydraft.engine_parts import context_length
from polydraft.errors import InvalidRequestError, ModelFormatError
from polydraft.files import system_error
from polydraft.text.hub_tokenizer import HubTokenizer
from polydraft.text.ids_only import IdsOnlyTokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from polydraft_transformers.decoder import Decoder, fixed_rows
from polydraft_transformers.drafters.mtp import MtpDrafter
from polydraft_transformers.engine import TransformersEngine
from polydraft_transformers.experts import experts_implementation, set_experts
from polydraft_transformers.logits_check import check_logits
from polydraft_transformers.memory import check_memory
from polydraft_transformers.resources import choose_device, choose_dtype, out_of_memory

__all__ = ["load_pair"]

_PATTERNS = ("*.json", "*.jinja", "*.safetensors", "tokenizer*")


def load_pair(request: LoadRequest) -> TransformersEngine:
    """Load target and drafter.

    Raises:
        DeviceError: The device does not exist.
        OutOfMemoryError: The weights, or the context asked for, do not fit into the free memory.
        ModelFormatError: A file is missing or damaged, or the architecture is unknown.
        InvalidRequestError: Unknown dtype or device, or an option for experts where there are none.
        ContextLengthError: A context longer than the model's.
        UnsupportedError: Layers, heads or experts that this backend cannot run as asked.
    """
    device = choose_device(request.device)
    options, plan = request.engine_options, request.plan
    sources = [source for source in (request.target, plan.drafter) if source is not None]
    if options.experts_implementation is not None and not any(map(_is_mixture, sources)):
        raise InvalidRequestError(
            f"The option experts_implementation has no effect: {request.target.id} is no mixture of experts.",
            "Leave it out.",
            argument="engine_options",
        )
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    target_path = fetch(request.target, request.hub, patterns=_PATTERNS)
    drafter_path = fetch(plan.drafter, request.hub, patterns=_PATTERNS) if plan.drafter is not None else None
    folders = [path for path in (target_path, drafter_path) if path is not None]
    dtype, note = choose_dtype(request, folders, device)
    check_memory(request, folders, dtype, device)
    k = plan.max_draft_tokens
    fixed = request.exactness == "bitwise"
    experts = experts_implementation(options.experts_implementation, dtype, device, fixed=fixed)
    model = _model(request.target, target_path, request, dtype, device, experts)
    if fixed and experts is not None:
        set_experts(model, experts, request.target.id, mixture=_is_mixture(request.target))
    # In float32 no expert's number is too large to be multiplied by 0.
    own_experts = experts is None and not fixed and device.type == "cpu" and dtype == torch.float32
    target = Decoder(model, fixed_rows(k) if fixed else k + 1, fixed=fixed, own_experts=own_experts)
    drafter: MtpDrafter | Decoder | None = None
    if plan.drafter is not None and drafter_path is not None:
        loaded = _model(plan.drafter, drafter_path, request, dtype, device, experts)
        vocab_size = int(target.lm_head.weight.shape[0])
        drafter = MtpDrafter(loaded, target) if plan.kind == "mtp" else Decoder(loaded, k + 1, vocab_size=vocab_size)
    longest = getattr(target.config, "max_position_embeddings", None)  # also where config.json leaves it out
    context = context_length(request, longest=longest)
    for decoder in (target, drafter):
        if isinstance(decoder, Decoder):
            check_logits(decoder, drafter=decoder is drafter)
    tokenizer = _tokenizer(target_path, request, int(target.config.vocab_size))
    return TransformersEngine(target, drafter, tokenizer, request, context, notes=(note,) if note else ())


def _model(
    source: ModelSource, path: Path, request: LoadRequest, dtype: torch.dtype, device: torch.device, experts: str | None
) -> Any:
    names = source.config.get("architectures") or []
    conditional = any(name.endswith("ForConditionalGeneration") for name in names)
    loader: Any = AutoModelForImageTextToText if conditional else AutoModelForCausalLM
    # Transformers refuses the setting where there are no experts, assistants of mixtures among them.
    extra = {"experts_implementation": experts} if experts and _is_mixture(source) else {}
    try:
        if source.model_type.endswith("_assistant"):
            loader = AutoModelForCausalLM
        with _quietly():
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=request.trust_remote_code, local_files_only=True
            )
            # A checkpoint may name kernels of the Hub here, which would be downloaded and run.
            config._attn_implementation, config._experts_implementation = "sdpa", None
            model, found = loader.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=request.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with their names
                **extra,
            )
            model.to(device=device)
    except Exception as error:  # of any kind, where config and weights do not match
        hint = "Choose a smaller model, or `dtype='bfloat16'`."
        refused = out_of_memory(error, f"loading {source.id}", hint) or system_error(
            error, f"{source.id} cannot be read"
        )
        raise refused or ModelFormatError(
            f"Transformers cannot load {source.id}: {_first_line(error)}",
            "Check that the checkpoint is complete and its architecture known to the installed version.",
        ) from error
    # Transformers fills tensors that the checkpoint does not have with random numbers, and only warns.
    mismatched = [f"{name} {[*ours]} instead of {[*wanted]}" for name, ours, wanted in found["mismatched_keys"]]
    missing = sorted([*found["missing_keys"], *mismatched])
    if missing:
        raise ModelFormatError(
            f"The weights of {source.id} do not fit its config: tensors are missing or of another shape "
            f"({', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}).",
            "Download the model again, or check that config.json belongs to these weights.",
        )
    return model.eval()


def _is_mixture(source: ModelSource) -> bool:
    text_config = source.config.get("text_config") or source.config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(text_config.get(name) for name in names)


def _tokenizer(path: Path, request: LoadRequest, vocab_size: int) -> Tokenizer:
    special = read_special_tokens(path, request.target.config)
    if not has_tokenizer(path):
        bos = request.target.config.get("bos_token_id")
        return IdsOnlyTokenizer(vocab_size, eos_token_ids=special.eos_token_ids, bos_token_id=bos)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=request.trust_remote_code
        )
    except Exception as error:  # of any kind: the fields of its files are not checked
        raise system_error(error, f"The tokenizer of {request.target.id} cannot be read") or ModelFormatError(
            f"Transformers cannot load the tokenizer of {request.target.id}: {_first_line(error)}",
            "Check that tokenizer.json exists and is complete.",
        ) from error
    return HubTokenizer(tokenizer, special, vocab_size=vocab_size)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars for weights that are already on this machine, and without Transformers' LOAD REPORT.

    What that report says of missing tensors is refused with their names; others are not the model's.
    """
    logger, shows_progress = logging.getLogger("transformers.modeling_utils"), _shows_progress()
    if shows_progress:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)
        if shows_progress:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _shows_progress() -> bool:
    return bool(transformers_logging.is_progress_bar_enabled())


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)
