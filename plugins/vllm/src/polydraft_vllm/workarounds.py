"""Workarounds for bugs in vLLM. Each is small, guarded by version and platform, and applied in every vLLM process.

vLLM calls ``apply_workarounds`` through its plugin system (entry-point group ``vllm.general_plugins``), perhaps several
times. ``self_test`` checks at load whether the verifier samples correctly; ``tests/test_vllm_workarounds.py`` fails
once vLLM no longer needs a workaround.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from polydraft_vllm.patches import replace, upstream
from polydraft_vllm.versions import installed_vllm

if TYPE_CHECKING:
    import torch

__all__ = ["WORKAROUNDS", "Workaround", "apply_workarounds", "expand_batch_to_tokens"]


@dataclass(frozen=True, slots=True)
class Workaround:
    """One bug, and what is done about it."""

    name: str
    versions: str
    """PEP 440 specifier of the versions that need it."""
    why: str
    apply: Callable[[], None]


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
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x) if replace_from != replace_to else x
    return torch.repeat_interleave(values, counts.to(torch.int64), output_size=num_tokens)


def _fix_sampling() -> None:
    from vllm.v1.sample import rejection_sampler

    replace(rejection_sampler, "expand_batch_to_tokens", expand_batch_to_tokens)


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
    constrained: torch.Tensor = upstream("vllm.v1.sample.rejection_sampler", "apply_top_k_top_p")(logits, k, p)
    return constrained


def _fix_top_k() -> None:
    from vllm.v1.sample import rejection_sampler

    replace(rejection_sampler, "apply_top_k_top_p", apply_top_k_top_p)


def _fix_compiled_helpers() -> None:
    from vllm.model_executor.layers import vocab_parallel_embedding
    from vllm.v1.sample import sampler

    for module, name in (
        (sampler, "batched_count_greater_than"),
        (vocab_parallel_embedding, "get_masked_input_and_mask"),
    ):
        compiled = getattr(module, name)
        replace(module, name, getattr(compiled, "_torchdynamo_orig_callable", compiled))


def _fix_seeds() -> None:
    from vllm.v1.worker import cpu_model_runner, gpu_input_batch

    from polydraft_vllm.seeds import add_request, sample

    replace(gpu_input_batch.InputBatch, "add_request", add_request)
    replace(cpu_model_runner.CPUModelRunner, "_sample", sample)


def _no_graphs(self: Any) -> None:
    """Capture no CUDA graphs of a centroid head: vLLM then runs the head eagerly."""


def _fix_centroid_head() -> None:
    from vllm.v1.spec_decode.gemma4 import Gemma4Proposer

    replace(Gemma4Proposer, "_setup_centroids_cuda_graphs", _no_graphs)


def rebind_kernels_without_llvmlite(overrides: Any) -> None:
    """vLLM's scan for kernels to replace, skipping llvmlite's modules, whose function wrappers crash it.

    They are there once numba has been imported, by the app or by vLLM's n-gram proposer; no engine starts after that.
    """
    from vllm.triton_utils import dispatcher

    shown = {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "llvmlite"}
    dispatcher.sys = SimpleNamespace(modules=shown)
    try:
        upstream("vllm.triton_utils.dispatcher", "_rebind_kernels")(overrides)
    finally:
        dispatcher.sys = sys


def _fix_second_engine() -> None:
    from vllm.triton_utils import dispatcher

    replace(dispatcher, "_rebind_kernels", rebind_kernels_without_llvmlite)


WORKAROUNDS: tuple[Workaround, ...] = (
    Workaround(
        "cpu-sampling",
        ">=0.32,<0.34",
        "With a temperature and drafts in one batch, the CPU verifier reads uninitialised sampling settings.",
        _fix_sampling,
    ),
    Workaround(
        "cpu-top-k",
        ">=0.32,<0.34",
        "A request with a top_k and without a top_p kills an engine that speculates, in the first step without drafts.",
        _fix_top_k,
    ),
    Workaround(
        "cpu-seeds",
        ">=0.32,<0.34",
        "A sampled request with a seed kills the engine if its prompt is prefilled in chunks ('CPU Generator does not "
        "use offset').",
        _fix_seeds,
    ),
    Workaround(
        "cpu-compiled-helpers",
        ">=0.32,<0.34",
        "Small functions are compiled in eager mode too: the first request with logprobs takes many seconds, and "
        "without a C++ compiler it kills the engine.",
        _fix_compiled_helpers,
    ),
    Workaround(
        "cpu-centroid-head",
        ">=0.32,<0.34",
        "A drafter with a centroid head (E2B, E4B) cannot start on CPU, because it captures CUDA graphs.",
        _fix_centroid_head,
    ),
    Workaround(
        "cpu-kernels-after-numba",
        ">=0.32,<0.34",
        "Once numba has been imported, no engine starts in this process ('_lib_fn_wrapper' has no 'get').",
        _fix_second_engine,
    ),
)


def apply_workarounds() -> None:
    """Apply those that the installed version and platform need."""
    installed = installed_vllm()
    if installed is None:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for workaround in WORKAROUNDS:
        if installed.release in SpecifierSet(workaround.versions):
            workaround.apply()
