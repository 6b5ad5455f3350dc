"""From a load request to a running in-process engine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.contract import RunningInfo
from polydraft.errors import BackendUnavailableError, UnsupportedError

from polydraft_vllm.checks import check_request
from polydraft_vllm.engine_args import check_arguments, engine_arguments, is_loaded_without_media
from polydraft_vllm.environment import prepare_environment
from polydraft_vllm.process_lock import VLLM_LOCK
from polydraft_vllm.resources import matmul_precision
from polydraft_vllm.start_errors import start_error
from polydraft_vllm.tokenizer import load_tokenizer
from polydraft_vllm.versions import require_vllm

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest

    from polydraft_vllm.engine import VllmEngine
    from polydraft_vllm.options import VllmOptions
    from polydraft_vllm.versions import InstalledVllm

__all__ = ["load_pair"]


def load_pair(request: LoadRequest) -> VllmEngine:
    """Fetch the pair and start the engine. Errors as for ``Backend.load_engine``."""
    installed = require_vllm()
    options: VllmOptions = request.engine_options
    check_request(request)
    if options.data_parallel_size > 1:
        raise UnsupportedError(
            "data_parallel_size above 1 needs engines in several processes, and this backend has one.",
            "Use `backend='vllm-server'`, or `polydraft serve` with the option.",
        )
    if options.distributed_executor_backend == "ray" and installed.is_cpu_build:
        raise UnsupportedError(
            f"The CPU build {installed.distribution} {installed.version} has no Ray executor: "
            "vLLM's CPU platform names no device by which Ray would place workers.",
            "Use `distributed_executor_backend='mp'`, or `polydraft batch --ray` with one session per machine.",
        )
    prepare_environment(cpu=installed.is_cpu_build)
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    from polydraft_vllm.engine import VllmEngine

    check_arguments(options.further, (field.name for field in dataclasses.fields(vllm.EngineArgs)))
    arguments, note = engine_arguments(request, installed)
    ahead = False
    with VLLM_LOCK, _random_state_kept():
        try:
            quiet = {"disable_log_stats": True, "use_tqdm_on_load": False}
            config = vllm.EngineArgs(**{**quiet, **arguments}).create_engine_config()
            if request.plan.kind is not None and not getattr(config, "use_v2_model_runner", False):
                # vLLM's first model runner counts drafts that are scheduled as output, so requests get none before
                # their ``min_new_tokens`` (see ``scheduler``).
                if options.async_scheduling is None:
                    config.scheduler_config.async_scheduling = False
                ahead = config.scheduler_config.async_scheduling
            engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
        except Exception as error:
            raise start_error(error, request.target.id) from error
        if current_platform.is_cpu() and request.plan.kind is not None:
            _test_sampling(engine, installed)
    sizes = config.parallel_config
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    device = "cpu" if current_platform.is_cpu() else "cuda:0"
    running = RunningInfo.of(
        request,
        engine=installed.distribution,
        engine_version=installed.version,
        dtype=dtype,
        matmul_precision=matmul_precision(dtype, device, os.environ),
        device=device,
        context_length=config.model_config.max_model_len,
        concurrency="concurrent",
        notes=(
            note,
            "vLLM cannot leave the drafter out for a request: plain calls are faster in a session with `drafter=None`."
            if request.plan.drafter is not None
            else "",
            "Only the language model is loaded, because torchvision is not installed."
            if is_loaded_without_media(request.target.config)
            else "",
            "With async_scheduling, requests get no drafts before `min_new_tokens`." if ahead else "",
            f"{sizes.world_size} workers ({sizes.distributed_executor_backend})." if sizes.world_size > 1 else "",
        ),
    )
    return VllmEngine(engine, load_tokenizer(Path(arguments["model"]), request), running)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds the random generators of the whole process at start; restore those of the app."""
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


def _test_sampling(engine: Any, installed: InstalledVllm) -> None:
    """Test the verifier in each worker, with the workarounds that were applied there.

    Raises:
        BackendUnavailableError: It samples wrongly. The engine has been freed.
    """
    from polydraft_vllm.engine import open_engines, shut_down
    from polydraft_vllm.self_test import sampling_fault_of_worker

    faults = [fault for fault in engine.collective_rpc(sampling_fault_of_worker) if fault is not None]
    if faults:
        shut_down(engine, alone=not open_engines())
        raise BackendUnavailableError(
            f"{installed.distribution} {installed.version} samples wrongly with speculation on CPU: {faults[0]}.",
            "Load with `drafter=None`, or use another backend; if VLLM_PLUGINS is set, add polydraft to it.",
        )
