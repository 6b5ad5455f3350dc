"""Workarounds for bugs in vLLM. Each is small, guarded by version and platform, and applied in every vLLM process.

vLLM calls ``apply_workarounds`` through its plugin system (entry-point group ``vllm.general_plugins``), perhaps several
times. ``self_test`` checks at load whether the verifier samples correctly; ``tests/test_vllm_workarounds.py`` fails
once vLLM no longer needs a workaround.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from packaging.specifiers import SpecifierSet

from polydraft_vllm.older_models import initialize_text_config, load_weights, share_embeddings, share_kv
from polydraft_vllm.patches import replace, upstream
from polydraft_vllm.seeds import add_request, sample, sample_each
from polydraft_vllm.soundness import (
    REJECTION_SAMPLER,
    SAMPLER,
    count_nans_by_request,
    count_nans_per_row,
    sample_rows,
    verify_rows,
)
from polydraft_vllm.soundness import sample as sample_soundly
from polydraft_vllm.versions import installed_vllm

__all__ = ["WORKAROUNDS", "Workaround", "apply_workarounds", "expand_batch_to_tokens"]


@dataclass(frozen=True, slots=True)
class Workaround:
    """One bug, and what is done about it."""

    name: str
    versions: str
    """PEP 440 specifier of the versions that need it."""
    why: str
    replacements: Mapping[str, Any]
    """Maps each replaced function to its replacement, as ``patches.replace`` takes them."""
    platform: Literal["cpu", "gpu", "any"] = "cpu"
    """Where it is needed: in vLLM's CPU build, on its other platforms, or everywhere."""


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Repeat each request's value for each of its draft tokens: the function of ``rejection_sampler`` in torch.

    vLLM's CPU fallback (``cpu_triton_utils._expand_kernel_impl``) converts the output to int64 before writing, and so
    writes into a copy: temperature, top_k and top_p stay uninitialised.

    Args:
        x: Shape [batch].
        cu_num_tokens: Shape [batch]: number of draft tokens of this request and all before it.
        num_tokens: Number of all draft tokens.
        replace_from: This value is replaced by ``replace_to`` (temperature 0 by 1).
        replace_to: The replacement; equal to ``replace_from``: nothing is replaced.

    Returns:
        Shape [num_tokens], of ``x``'s dtype.
    """
    # ``cu_num_tokens`` is an inclusive sum: differences are each request's own count, which may be 0.
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x) if replace_from != replace_to else x
    # With ``output_size`` torch need not add up the counts to find the shape.
    return torch.repeat_interleave(values, counts.to(torch.int64), output_size=num_tokens)


def apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Return early in steps without any draft token, such as a prefill alone; else vLLM's own function.

    The verifier then has no rows, and on CPU vLLM takes the maximum of an empty top_k: the first request with a top_k
    and without a top_p kills the engine.

    Args:
        logits: Shape [draft tokens, vocabulary].
        k: Shape [draft tokens].
        p: Shape [draft tokens].
    """
    if not len(logits):
        return logits
    constrained: torch.Tensor = upstream("vllm.v1.sample.rejection_sampler.apply_top_k_top_p")(logits, k, p)
    return constrained


def _no_graphs(self: Any) -> None:
    """Capture no CUDA graphs of a centroid head: vLLM then runs the head eagerly."""


def rebind_kernels_without_llvmlite(overrides: Any) -> None:
    """vLLM's scan for kernels to replace, skipping llvmlite's modules, whose function wrappers crash it.

    They are there once numba has been imported, by the app or by vLLM's n-gram proposer; no engine starts after that.
    """
    from vllm.triton_utils import dispatcher

    # The scan reads ``sys.modules`` through its module's global ``sys``, which is replaced for the call.
    shown = {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "llvmlite"}
    dispatcher.sys = SimpleNamespace(modules=shown)
    try:
        upstream("vllm.triton_utils.dispatcher._rebind_kernels")(overrides)
    finally:
        dispatcher.sys = sys


def postprocess_triton(self: Any) -> None:
    """``CPUModelRunner._postprocess_triton``, which replaces kernels in modules, but not in those who launch them."""
    from vllm.model_executor.warmup.jit_warmup_triton_helper import VllmTritonJitKernel
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.spec_decode import utils

    upstream("vllm.v1.worker.cpu_model_runner.CPUModelRunner._postprocess_triton")(self)
    for module in (rejection_sampler, utils):
        for launcher in vars(module).values():
            if isinstance(launcher, VllmTritonJitKernel):
                launcher.kernel = getattr(module, getattr(launcher.kernel, "__name__", ""), launcher.kernel)


_SAMPLING_PARAMS = "vllm.v1.worker.gpu.sample.sampler.Sampler.apply_sampling_params"


def apply_sampling_params(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """vLLM's own, on a copy in float32: it stores what comes of penalties and temperature in the logits' own dtype.

    Args:
        self: vLLM's ``Sampler``.
        logits: Shape [rows, vocabulary], of any dtype.
        args: As vLLM has them.
        kwargs: Likewise.

    Returns:
        Shape [rows, vocabulary], in float32.
    """
    adjusted: torch.Tensor = upstream(_SAMPLING_PARAMS)(self, logits.float(), *args, **kwargs)
    return adjusted


_WHY_COUNTS = "With drafts, counts of NaN in logits are those of other rows; and infinities are left out."

WORKAROUNDS: tuple[Workaround, ...] = (
    # Those of the counts first, since a later one builds upon ``_sample``.
    Workaround(
        "nan-counts",
        ">=0.28,<0.34",
        _WHY_COUNTS,
        {
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample": sample_soundly,
            "vllm.v1.worker.gpu_model_runner.count_nans_per_row": count_nans_per_row,
        },
        platform="any",
    ),
    Workaround(
        "nan-counts-by-request",
        ">=0.26,<0.28",
        _WHY_COUNTS,
        {
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample": sample_soundly,
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner._get_nans_in_logits": count_nans_by_request,
        },
        platform="any",
    ),
    Workaround(
        "gpu-nan-counts",  # those of the second model runner
        ">=0.26,<0.34",
        _WHY_COUNTS,
        {SAMPLER: sample_rows, REJECTION_SAMPLER: verify_rows},
        platform="gpu",
    ),
    Workaround(
        "cpu-sampling",
        ">=0.26,<0.34",
        "With a temperature and drafts in one batch, the CPU verifier reads uninitialised sampling settings.",
        {"vllm.v1.sample.rejection_sampler.expand_batch_to_tokens": expand_batch_to_tokens},
    ),
    Workaround(
        "cpu-top-k",
        ">=0.26,<0.34",
        "A request with a top_k and without a top_p kills an engine that speculates, in the first step without drafts.",
        {"vllm.v1.sample.rejection_sampler.apply_top_k_top_p": apply_top_k_top_p},
    ),
    Workaround(
        "cpu-seeds",
        ">=0.26,<0.34",
        "A sampled request with a seed kills the engine if its prompt is prefilled in chunks ('CPU Generator does not "
        "use offset').",
        {
            "vllm.v1.worker.gpu_input_batch.InputBatch.add_request": add_request,
            "vllm.v1.worker.cpu_model_runner.CPUModelRunner._sample": sample,
        },
    ),
    Workaround(
        "cpu-seeds-of-a-batch",
        ">=0.26,<0.30",
        "The seeds of sampled requests are ignored while a request without one, such as a greedy one, is in the batch.",
        {"vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu": sample_each},
    ),
    Workaround(
        "cpu-compiled-helpers",
        ">=0.26,<0.34",
        "Small functions are compiled in eager mode too: the first request with logprobs takes many seconds, and "
        "without a C++ compiler it kills the engine.",
        {
            "vllm.v1.sample.sampler.batched_count_greater_than": None,
            "vllm.model_executor.layers.vocab_parallel_embedding.get_masked_input_and_mask": None,
        },
    ),
    Workaround(
        "cpu-centroid-head",
        ">=0.26,<0.34",
        "A drafter with a centroid head (E2B, E4B) cannot start on CPU, because it captures CUDA graphs.",
        {"vllm.v1.spec_decode.gemma4.Gemma4Proposer._setup_centroids_cuda_graphs": _no_graphs},
    ),
    Workaround(
        "cpu-kernels-after-numba",
        ">=0.31,<0.34",
        "Once numba has been imported, no engine starts in this process ('_lib_fn_wrapper' has no 'get').",
        {"vllm.triton_utils.dispatcher._rebind_kernels": rebind_kernels_without_llvmlite},
    ),
    Workaround(
        "cpu-kernels-of-the-verifier",
        ">=0.30,<0.31",
        "No engine with a drafter gets past its first round ('Cannot inspect kernel parameters').",
        {"vllm.v1.worker.cpu_model_runner.CPUModelRunner._postprocess_triton": postprocess_triton},
    ),
    Workaround(
        "cpu-drafter-kv",
        ">=0.26,<0.27",
        "An assistant of Gemma 4 writes KV of its own over the target's.",
        {"vllm.v1.spec_decode.gemma4.Gemma4Proposer._setup_gemma4_kv_sharing": share_kv},
    ),
    Workaround(
        "gpu-sampling-precision",
        ">=0.26,<0.27",
        "In 16 bits, penalties and temperature are rounded to the logits' dtype: tokens come that settings exclude.",
        {_SAMPLING_PARAMS: apply_sampling_params},
        platform="gpu",
    ),
    Workaround(
        "gemma4-per-layer-config",
        ">=0.26,<0.28",
        "Gemma 4's configs are read as Transformers before 5.15 saved them only.",
        {"transformers.models.gemma4.configuration_gemma4.Gemma4TextConfig.__init__": initialize_text_config},
        platform="any",
    ),
    Workaround(
        "gemma4-shared-key-norms",
        ">=0.26,<0.30",
        "Checkpoints of Gemma 4 (E2B, E4B) that newer versions of Transformers saved are refused for want of norms "
        "that are never used.",
        {"vllm.model_executor.models.gemma4.Gemma4ForCausalLM.load_weights": load_weights},
        platform="any",
    ),
    Workaround(
        "gemma4-drafter-embedding",
        ">=0.26,<0.27",
        "An assistant of Gemma 4 that is narrower than its target keeps an embedding of its own, and cannot start.",
        {"vllm.v1.spec_decode.gemma4.Gemma4Proposer._maybe_share_embeddings": share_embeddings},
        platform="any",
    ),
)


def apply_workarounds() -> None:
    """Apply those that the installed version and platform need."""
    installed = installed_vllm()
    if installed is None:
        return
    from vllm.platforms import current_platform

    for workaround in WORKAROUNDS:
        here = "cpu" if current_platform.is_cpu() else "gpu"
        if workaround.platform in ("any", here) and installed.release in SpecifierSet(workaround.versions):
            for path, replacement in workaround.replacements.items():
                replace(path, replacement)
