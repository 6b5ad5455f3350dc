"""Mends of vLLM's own faults. Each is small, guarded by version and platform, and applied in every vLLM process.

vLLM calls ``apply_mends`` through its plugin system (entry-point group ``vllm.general_plugins``); it may be called
several times. ``self_test`` and the probes say whether a mend works and whether upstream still needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from polydraft_vllm.versions import installed_vllm

if TYPE_CHECKING:
    import torch

__all__ = ["MENDS", "Mend", "apply_mends", "expand_batch_to_tokens", "rebind_kernels_without_llvmlite", "upstream"]


@dataclass(frozen=True, slots=True)
class Mend:
    """One fault and its mend."""

    name: str
    versions: str
    why: str
    apply: Callable[[], None]


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Repeat each request's value for each of its draft tokens: ``vllm.v1.sample.rejection_sampler``'s, in torch.

    vLLM's CPU fallback (``cpu_triton_utils._expand_kernel_impl``) converts the output to int64 before it writes, and so
    writes into a copy: temperature, top_k and top_p stay uninitialised.

    Args:
        x: Shape [batch].
        cu_num_tokens: Shape [batch]: tokens of this request and all before it.
        num_tokens: Their number, the length of the result.
        replace_from: A value that is replaced ...
        replace_to: ... by this one (temperature 0 by 1).

    Returns:
        Shape [num_tokens], of ``x``'s dtype.
    """
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x) if replace_from != replace_to else x
    return torch.repeat_interleave(values, counts.to(torch.int64), output_size=num_tokens)


def _mend_sampling() -> None:
    from vllm.v1.sample import rejection_sampler

    _replace(rejection_sampler, "expand_batch_to_tokens", expand_batch_to_tokens)


def apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """``vllm.v1.sample.rejection_sampler``'s for steps that hold no draft at all, such as a prefill alone.

    The verifier then has no rows, and on CPU vLLM asks for the largest of no top_k: the first request with a top_k and
    no top_p kills the engine.

    Args:
        logits: Shape [draft tokens, vocabulary].
        k: Shape [draft tokens].
        p: Shape [draft tokens].
    """
    if not len(logits):
        return logits
    constrained: torch.Tensor = upstream("vllm.v1.sample.rejection_sampler", "apply_top_k_top_p")(logits, k, p)
    return constrained


def _mend_top_k() -> None:
    from vllm.v1.sample import rejection_sampler

    _replace(rejection_sampler, "apply_top_k_top_p", apply_top_k_top_p)


def _mend_compiled_helpers() -> None:
    from vllm.model_executor.layers import vocab_parallel_embedding
    from vllm.v1.sample import sampler

    for module, name in (
        (sampler, "batched_count_greater_than"),
        (vocab_parallel_embedding, "get_masked_input_and_mask"),
    ):
        compiled = getattr(module, name)
        _replace(module, name, getattr(compiled, "_torchdynamo_orig_callable", compiled))


def _mend_seeds() -> None:
    from vllm.v1.worker import cpu_model_runner, gpu_input_batch

    from polydraft_vllm.seeds import add_request, sample

    _replace(gpu_input_batch.InputBatch, "add_request", add_request)
    _replace(cpu_model_runner.CPUModelRunner, "_sample", sample)


def _no_graphs(self: Any) -> None:
    """CUDA graphs of a centroid head: the CPU has none, and without them vLLM runs the head eagerly."""


def _mend_centroid_head() -> None:
    from vllm.v1.spec_decode.gemma4 import Gemma4Proposer

    _replace(Gemma4Proposer, "_setup_centroids_cuda_graphs", _no_graphs)


def rebind_kernels_without_llvmlite(overrides: Any) -> None:
    """VLLM's own scan of all modules for kernels to replace, but for llvmlite's: it dies of their functions' wrappers.

    They exist once numba was imported, by the app or by vLLM's n-gram proposer; no further engine starts then.
    """
    from vllm.triton_utils import dispatcher

    shown = {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "llvmlite"}
    dispatcher.sys = SimpleNamespace(modules=shown)
    try:
        upstream("vllm.triton_utils.dispatcher", "_rebind_kernels")(overrides)
    finally:
        dispatcher.sys = sys


def _mend_second_engine() -> None:
    from vllm.triton_utils import dispatcher

    _replace(dispatcher, "_rebind_kernels", rebind_kernels_without_llvmlite)


_upstream: dict[tuple[str, str], Any] = {}


def upstream(owner: str, name: str) -> Any:
    """VLLM's own version of what a mend replaced.

    Args:
        owner: Name of the module or class.
        name: Of the function.
    """
    return _upstream[owner, name]


def _replace(owner: Any, name: str, mended: Any) -> None:
    """Put ``mended`` in its place, once, and keep what was there."""
    key = (owner.__name__, name)
    if key not in _upstream:
        _upstream[key] = getattr(owner, name)
        setattr(owner, name, mended)


MENDS: tuple[Mend, ...] = (
    Mend(
        "cpu-sampling",
        ">=0.32,<0.34",
        "With a temperature and drafts in one batch, the CPU verifier reads uninitialised sampling settings.",
        _mend_sampling,
    ),
    Mend(
        "cpu-top-k",
        ">=0.32,<0.34",
        "A request with a top_k and no top_p kills an engine that speculates, in the first step without drafts.",
        _mend_top_k,
    ),
    Mend(
        "cpu-seeds",
        ">=0.32,<0.34",
        "A sampled request with a seed kills the engine if its prompt is processed in parts ('CPU Generator does not "
        "use offset').",
        _mend_seeds,
    ),
    Mend(
        "cpu-compiled-helpers",
        ">=0.32,<0.34",
        "Small functions are compiled in eager mode too: the first request with logprobs takes many seconds, and where "
        "there is no C++ compiler it kills the engine.",
        _mend_compiled_helpers,
    ),
    Mend(
        "cpu-centroid-head",
        ">=0.32,<0.34",
        "A drafter with a centroid head (E2B, E4B) dies on CPU, as it captures CUDA graphs.",
        _mend_centroid_head,
    ),
    Mend(
        "cpu-kernels-beside-numba",
        ">=0.32,<0.34",
        "Once numba was imported, no engine starts any more in this process ('_lib_fn_wrapper' has no 'get').",
        _mend_second_engine,
    ),
)


def apply_mends() -> None:
    """Apply what the installed version and platform need."""
    installed = installed_vllm()
    if installed is None:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for mend in MENDS:
        if installed.release in SpecifierSet(mend.versions):
            mend.apply()
