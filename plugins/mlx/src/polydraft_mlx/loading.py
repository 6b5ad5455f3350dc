"""From a load request to a loaded pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from polydraft.checkpoints.config import read_config, text_config
from polydraft.checkpoints.fetch import fetch, has_tokenizer
from polydraft.checkpoints.special_tokens import read_special_tokens
from polydraft.contract import LoadRequest, ModelSource, Tokenizer
from polydraft.engine_parts import context_length
from polydraft.engine_parts.memory import MemoryEstimate, expected_tokens
from polydraft.errors import InvalidRequestError, ModelFormatError, OutOfMemoryError, UnsupportedError
from polydraft.files import system_error
from polydraft.hardware import cpu_dtype
from polydraft.text.hub_tokenizer import HubTokenizer
from polydraft.text.ids_only import IdsOnlyTokenizer
from transformers import AutoTokenizer

from polydraft_mlx.assistant import load_assistant
from polydraft_mlx.config import is_gemma4, overrides
from polydraft_mlx.decoder import Decoder
from polydraft_mlx.drafters.mtp import MtpDrafter
from polydraft_mlx.engine import MlxEngine
from polydraft_mlx.resources import (
    Runtime,
    ask_for_full_float32,
    find_device,
    free_memory,
    in_one_line,
    matmul_precision,
)
from polydraft_mlx.workarounds import lay_by_columns, share_rotations, widen_experts

__all__ = ["load_pair"]

_PATTERNS = ("*.json", "*.jinja", "*.safetensors", "tokenizer*")
_DTYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "fp32": mx.float32,
    "fp16": mx.float16,
    "bf16": mx.bfloat16,
}
_LEAST_CONTEXT = 256
"""If the model's own context does not fit into memory, at least this many tokens must."""


def load_pair(request: LoadRequest) -> MlxEngine:
    """Load target and drafter. Weights are read only once weights and context are known to fit.

    Raises:
        DeviceError: The device does not exist.
        OutOfMemoryError: The weights, or the requested context, do not fit into the free memory.
        ModelFormatError: A file is missing or damaged, or mlx-lm does not know the architecture.
        InvalidRequestError: Unknown dtype, or a context longer than the model's.
        UnsupportedError: The state of the model's layers cannot be rolled back.
    """
    runtime = Runtime(find_device(request.device))
    if request.dtype != "auto" and request.dtype not in _DTYPES:
        raise InvalidRequestError(f"`dtype={request.dtype!r}` is unknown.", f"Use auto, {', '.join(_DTYPES)}.")
    plan = request.plan
    gemma4_default = 131_072 if is_gemma4(request.target.config) else None
    longest = text_config(request.target.config).get("max_position_embeddings") or gemma4_default
    wanted = context_length(request, longest=longest)
    target_path = fetch(request.target, request.hub, patterns=_PATTERNS)
    drafter_path = fetch(plan.drafter, request.hub, patterns=_PATTERNS) if plan.drafter is not None else None
    dtype, note = _dtype(request, [path for path in (target_path, drafter_path) if path is not None], runtime)
    rows = plan.max_draft_tokens + 1
    if runtime.name != "cpu":
        ask_for_full_float32()
    with runtime.use(f"{request.target.id} was loaded"):
        models = [_model(request.target, target_path, request, dtype)]
        target = Decoder(models[0], request.target.id, rows, fixed=request.exactness == "bitwise")
        drafter: MtpDrafter | Decoder | None = None
        if plan.drafter is not None and drafter_path is not None:
            if plan.kind == "mtp":
                if target.gemma4 is None:
                    raise UnsupportedError(
                        f"{request.target.id} is not a Gemma 4, and assistants draft only for these.",
                        "Use a draft model, or `drafter='ngram'`.",
                    )
                models.append(load_assistant(plan.drafter, drafter_path, dtype))
                drafter = MtpDrafter(models[1], target)
            else:
                models.append(_model(plan.drafter, drafter_path, request, dtype))
                drafter = Decoder(models[1], plan.drafter.id, rows)
        widened = runtime.name == "cpu" and sum(widen_experts(model) for model in models) > 0
        decoders = [target, *([drafter] if isinstance(drafter, Decoder) else [])]
        context, notes = _fit(request, wanted, models, decoders, runtime)
        for model in models:
            if runtime.name == "cpu":
                lay_by_columns(model)
                share_rotations(model)
            mx.eval(model.parameters())
        mx.clear_cache()
        precision = matmul_precision(target.dtype)
    notes += filter(None, (note, _quantization(request.target)))
    if widened:
        notes.append("The experts run in float32: on the CPU, MLX multiplies chosen experts in no other dtype.")
    tokenizer = _tokenizer(target_path, request, target.vocab_size)
    return MlxEngine(runtime, target, drafter, tokenizer, request, context, notes, precision)


def _dtype(request: LoadRequest, folders: list[Path], runtime: Runtime) -> tuple[mx.Dtype | None, str]:
    """The dtype to convert unquantized weights to (None: keep the stored one), and a note about it, if any."""
    if request.dtype != "auto":
        return _DTYPES[request.dtype], ""
    if runtime.name != "cpu":
        return None, ""
    name, note = cpu_dtype(request.target.config, folders, free_memory(runtime.device))
    return (mx.float32 if name == "float32" and note else None), note


def _model(source: ModelSource, path: Path, request: LoadRequest, dtype: mx.Dtype | None) -> Any:
    """Load a model of mlx-lm lazily; MLX reads its weights when they are evaluated."""
    try:
        # Not the source's: the folder's agrees with the weights.
        config = overrides(read_config(path / "config.json", source.id), source.id)
        if not request.trust_remote_code:
            config["model_file"] = None  # code in the checkpoint's folder, which mlx-lm would ask to run
        model, _ = load_model(path, lazy=True, model_config=config, trust_remote_code=request.trust_remote_code)
    except Exception as error:  # of any kind: mlx-lm does not check configs and files
        raise system_error(error, f"{source.id} cannot be read") or ModelFormatError(
            f"mlx-lm cannot load {source.id}: {in_one_line(error)}",
            "Check that the checkpoint is complete, and that mlx-lm knows its architecture and quantization.",
        ) from error
    if dtype is not None:
        model.set_dtype(dtype)
    return model


def _quantization(source: ModelSource) -> str:
    """One sentence about a quantized checkpoint, or an empty string."""
    found = source.config.get("quantization") or text_config(source.config).get("quantization")
    if not isinstance(found, dict) or "bits" not in found:
        return ""
    mode = found.get("mode", "affine")
    return f"The target is quantized: {found['bits']} bits ({mode}, groups of {found.get('group_size', 64)})."


def _tokenizer(path: Path, request: LoadRequest, vocab_size: int) -> Tokenizer:
    special = read_special_tokens(path, request.target.config)
    if not has_tokenizer(path):
        bos = request.target.config.get("bos_token_id")
        return IdsOnlyTokenizer(vocab_size, eos_token_ids=special.eos_token_ids, bos_token_id=bos)
    try:
        trust = request.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # of huggingface_hub, of tokenizers, of the model's own code
        raise system_error(error, f"The tokenizer of {request.target.id} cannot be read") or ModelFormatError(
            f"The tokenizer of {request.target.id} cannot be loaded: {in_one_line(error)}",
            "Check that tokenizer.json is there and complete.",
        ) from error
    return HubTokenizer(tokenizer, special, vocab_size=vocab_size)


def _fit(
    request: LoadRequest, wanted: int, models: list[Any], decoders: list[Decoder], runtime: Runtime
) -> tuple[int, list[str]]:
    """The context length that fits next to the weights, and notes."""
    weights = sum(int(array.nbytes) for model in models for _, array in tree_flatten(model.parameters()))
    free = free_memory(runtime.device)
    scores = _scores(request, wanted, runtime)
    growing = sum(decoder.kv_bytes_per_token for decoder in decoders) + scores
    fixed = sum(decoder.kv_bytes_fixed for decoder in decoders)
    left = free - weights - fixed - (request.prefix_cache_bytes or 0)  # what is kept by default gives way
    fits = wanted if growing * wanted <= left else left // growing
    tokens = expected_tokens(request)
    kv = fixed + (growing - scores) * tokens
    MemoryEstimate(weights, kv, tokens, work=scores * tokens).announce(request, runtime.name, free)
    if fits < min(wanted, _LEAST_CONTEXT):
        raise OutOfMemoryError(
            f"The weights need {_gib(weights)}, the sliding layers {_gib(fixed)} and each token of context {growing} "
            f"bytes, and {runtime.name} has {_gib(free)} free.",
            "Give a smaller prefill_chunk_size." if scores > growing // 2 else "Choose a smaller or a quantized model.",
        )
    notes = [f"Weights take {_gib(weights)}, each token of context {growing} bytes, and the sliding layers {fixed}."]
    if fits < wanted:
        if request.context_length is not None:
            raise OutOfMemoryError(
                f"A context of {wanted} tokens needs {_gib(growing * wanted)} next to {_gib(weights)} of weights, and "
                f"{runtime.name} has {_gib(free)} free.",
                f"Give `context_length={fits // 2}` or less.",
            )
        notes.append(f"The context is shortened from {wanted} to {fits} tokens to fit into memory.")
    return int(fits), notes


def _scores(request: LoadRequest, context: int, runtime: Runtime) -> int:
    """Bytes per token of a full context that attention to it takes, while a chunk of a prompt is run.

    On the CPU MLX stores the scores of all heads and their softmax; on GPUs its kernel does not.
    """
    if runtime.name != "cpu":
        return 0
    heads = int(text_config(request.target.config).get("num_attention_heads") or 32)
    return 2 * 4 * heads * min(int(request.engine_options.prefill_chunk_size), context)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
