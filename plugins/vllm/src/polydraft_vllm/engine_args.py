"""The engine arguments that vLLM is started with, in process and as a server."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from polydraft.checkpoints.config import has_experts
from polydraft.checkpoints.fetch import fetch
from polydraft.errors import InvalidRequestError

from polydraft_vllm.resources import choose_dtype, default_kv_bytes
from polydraft_vllm.speculation import speculative_config
from polydraft_vllm.versions import check_transformers

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest

    from polydraft_vllm.options import VllmOptions
    from polydraft_vllm.versions import InstalledVllm

__all__ = ["OBSOLETE", "RESERVED", "check_arguments", "engine_arguments", "is_loaded_without_media"]

_MAX_LOGPROBS = 64
"""The most that ``GenerationSettings.logprobs`` allows."""
_V2_EXPERTS = Version("0.32")
"""From here on mixtures of experts have vLLM's second model runner; they have the first one in 0.26 (read in both)."""
_WITH_MEDIA, _TEXT_ONLY = "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"

_OTHER_WEIGHTS = {"pt", "npcache", "mistral"}
"""Load formats that read pickle files, or Mistral's own layout."""

RESERVED: dict[str, str] = {
    "model": "Use the argument `target` instead.",
    "tokenizer": "Leave it out: polydraft reads the target's own.",
    "served_model_name": "Use `polydraft serve`.",
    "skip_tokenizer_init": "Leave it out: polydraft gives vLLM token ids.",
    "dtype": "Use the argument `dtype` instead.",
    "max_model_len": "Use `context_length`.",
    "revision": "Use the argument `revision` instead.",
    "hf_token": "Use `token`.",
    "download_dir": "Use `cache_dir`.",
    "trust_remote_code": "Use the argument `trust_remote_code` instead.",
    "spec_method": "Use `drafter`.",
    "spec_model": "Use `drafter`.",
    "spec_tokens": "Use `num_speculative_tokens`.",
    "scheduler_cls": "Leave it out: polydraft's scheduler can decode single requests without drafts.",
    "api_key": "Use the environment variable VLLM_API_KEY, or the backend vllm-server, which has this option.",
    "stream_interval": "Leave it out: polydraft reads every step.",
    "logprobs_mode": "Leave it out: `logprobs` are log-probabilities of the model's own logits.",
    "max_logprobs": "Leave it out: as many as `logprobs` allows.",
}
"""Engine arguments that polydraft sets itself -> what to do instead."""

OBSOLETE: dict[str, str] = {
    "speculative_model": "Use `drafter`.",
    "num_speculative_tokens": "Use the argument `num_speculative_tokens` instead.",
    "speculative_draft_tensor_parallel_size": "Use `speculative_config={'draft_tensor_parallel_size': ...}`.",
    "speculative_max_model_len": "Use `speculative_config={'max_model_len': ...}`.",
    "speculative_model_quantization": "Use `speculative_config={'quantization': ...}`.",
    "ngram_prompt_lookup_max": "Use `speculative_config={'prompt_lookup_max': ...}`.",
    "ngram_prompt_lookup_min": "Use `speculative_config={'prompt_lookup_min': ...}`.",
    "speculative_disable_by_batch_size": "Use `speculative_config={'num_speculative_tokens_per_batch_size': ...}`.",
    "speculative_disable_mqa_scorer": "Leave it out: the engine that had it is gone.",
    "spec_decoding_acceptance_method": "Use `speculative_config={'rejection_sample_method': ...}`.",
    "typical_acceptance_sampler_posterior_threshold": "Leave it out: speculation must not change the output.",
    "typical_acceptance_sampler_posterior_alpha": "Leave it out: speculation must not change the output.",
    "use_v2_block_manager": "Leave it out: there is one block manager.",
    "num_lookahead_slots": "Leave it out: it follows from `num_speculative_tokens`.",
    "worker_use_ray": "Use `distributed_executor_backend='ray'`.",
    "engine_use_ray": "Use `distributed_executor_backend='ray'`.",
    "device": "Use the argument `device` instead.",
    "max_seq_len_to_capture": "Use max_cudagraph_capture_size.",
    "max_context_len_to_capture": "Use max_cudagraph_capture_size.",
    "guided_decoding_backend": "Use structured_outputs_config.",
    "swap_space": "Use kv_offloading_size.",
    "task": "Leave it out: polydraft generates.",
}
"""Arguments of older versions, still seen in articles -> what to do instead."""


def engine_arguments(request: LoadRequest, installed: InstalledVllm) -> tuple[dict[str, Any], str]:
    """Fetch the pair's files, and choose the engine arguments.

    Returns:
        Keyword arguments of ``vllm.EngineArgs``; ``model`` is the target's folder. Also returns a note on the dtype for
        the user, which may be empty.

    Raises:
        PolydraftError: A file is missing or damaged, ``speculative_config`` cannot be made, options contradict each
            other, or another version of Transformers is needed.
    """
    check_transformers(installed, request.target.config)
    target = fetch(request.target, request.hub)
    drafter = fetch(request.plan.drafter, request.hub) if request.plan.drafter is not None else None
    dtype, note = choose_dtype(request, installed, target, drafter)
    options: VllmOptions = request.engine_options
    plan, cpu = request.plan, installed.is_cpu_build
    # vLLM ignores its two other ways to say it where it is given bytes.
    own_size = cpu and "gpu_memory_utilization" not in options.further and not os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if request.prefix_cache_bytes == 0 and options.further.get("enable_prefix_caching"):
        raise InvalidRequestError(
            "enable_prefix_caching is True, and `prefix_cache_bytes=0` turns it off.", "Leave one of them out."
        )
    chosen: dict[str, Any] = {
        "enforce_eager": True if options.enforce_eager is None and cpu else options.enforce_eager,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes or (default_kv_bytes(request) if own_size else None),
        "max_num_seqs": options.max_num_seqs,
        # Else vLLM's own default: on, for models that it can reuse the KV of.
        "enable_prefix_caching": False if request.prefix_cache_bytes == 0 else None,
        "distributed_executor_backend": options.distributed_executor_backend,
        "async_scheduling": options.async_scheduling,
    }
    if plan.kind is not None:
        if options.async_scheduling is None and has_experts(request.target.config) and installed.release < _V2_EXPERTS:
            chosen["async_scheduling"] = False  # as ``loading.load_pair`` does; a server is not asked for its runner
        chosen["speculative_config"] = speculative_config(
            plan.kind,
            drafter,
            plan.num_speculative_tokens,
            installed.release,
            options.speculative_config,
            tensor_parallel_size=options.tensor_parallel_size,
        )
    if is_loaded_without_media(request.target.config):
        chosen["hf_overrides"] = {"architectures": [_TEXT_ONLY]}
    arguments = {
        "model": str(target),
        "dtype": dtype,
        "load_format": "safetensors",  # vLLM's own default falls back to pickle files
        "max_model_len": request.context_length or -1,  # -1: as much as fits into the KV cache
        "trust_remote_code": request.trust_remote_code,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "scheduler_cls": "polydraft_vllm.scheduler.scheduler",
        "max_logprobs": _MAX_LOGPROBS,
        "structured_outputs_config": {"backend": "guidance"},  # what the core's other engines use, too
        "limit_mm_per_prompt": {"image": 0, "audio": 0, "video": 0},  # text only: no encoder is loaded or profiled
        **{name: value for name, value in chosen.items() if value is not None},
        **options.further,
    }
    overrides = options.further.get("hf_overrides")
    if isinstance(overrides, Mapping) and "hf_overrides" in chosen:
        arguments["hf_overrides"] = {**chosen["hf_overrides"], **overrides}
    return arguments, note


def is_loaded_without_media(config: Mapping[str, Any]) -> bool:
    """Whether only the target's language model is loaded, because torchvision is not installed.

    vLLM's class for Gemma 4 with images needs torchvision, which not every build of torch has a matching build of.
    polydraft gives vLLM no images, and vLLM's class for text accepts the same checkpoints.
    """
    return _WITH_MEDIA in (config.get("architectures") or ()) and importlib.util.find_spec("torchvision") is None


def check_arguments(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse engine arguments that polydraft sets, or that are not among ``known``, the fields of ``EngineArgs``.

    Raises:
        InvalidRequestError: One is reserved, obsolete or unknown.
    """
    names = {name for name in known if not name.startswith("_")}
    if (form := str(given.get("load_format", "")).lower()) in _OTHER_WEIGHTS:
        raise InvalidRequestError(
            f"With load_format={form}, vLLM loads other files than those that polydraft has checked.",
            "Leave it out: the safetensors weights are loaded.",
        )
    for name in given:
        if name in RESERVED:
            raise InvalidRequestError(f"The engine option {name} is set by polydraft itself.", RESERVED[name])
        if name in OBSOLETE and name not in names:
            raise InvalidRequestError(
                f"The engine option {name} is obsolete: this vLLM has no such argument.", OBSOLETE[name]
            )
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Engine arguments are the fields of vllm.EngineArgs."
            raise InvalidRequestError(f"vLLM has no engine argument {name!r}.", hint)
