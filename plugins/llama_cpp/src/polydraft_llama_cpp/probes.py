"""Probes: whether the faults of llama.cpp that the conformance suite excludes are still there."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polydraft_llama_cpp.bindings import library

__all__ = ["drafter_window_is_narrow", "gelu_is_rounded"]

_F32 = 0
_BUFFER = 16 << 20
_CONTEXT = (2, *(300 + (7 * index) % 600 for index in range(90)))
_UPSTREAM = {346: 0.6253, 306: 0.0524, 280: 0.3489, 1875: -7.5419}
"""Token id -> logit of tiny-31b's drafter after that context, by Transformers 5.22.2 in float32."""
_NARROW = {346: 0.4814, 306: -0.0650, 280: 0.4649, 1875: -7.6574}
"""The same with a sliding window two positions shorter, as in llama.cpp."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def gelu_is_rounded() -> bool:
    """Whether ggml's GELU on the CPU is a table of float16 values, whatever the type of its input.

    It is as long as ``ggml/src/ggml-cpu/vec.h`` defines GGML_GELU_FP16: then two inputs that differ in the last bit of
    float32 may give values that differ by 1 part in 2,048, and logits in float32 carry float16's noise.
    """
    lib = library()._lib

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(lib, name)
        found.restype, found.argtypes = result, list(arguments)
        return found

    pointer = ctypes.c_void_p
    context = function("ggml_init", pointer, _InitParams)(_InitParams(_BUFFER, None, False))
    try:
        count = 64
        given = function("ggml_new_tensor_1d", pointer, pointer, ctypes.c_int, ctypes.c_int64)(context, _F32, count)
        data = function("ggml_get_data_f32", ctypes.POINTER(ctypes.c_float), pointer)
        inputs = [0.1 + index / 37 for index in range(count)]
        values = data(given)
        for index, value in enumerate(inputs):
            values[index] = value
        result = function("ggml_gelu", pointer, pointer, pointer)(context, given)
        graph = function("ggml_new_graph", pointer, pointer)(context)
        function("ggml_build_forward_expand", None, pointer, pointer)(graph, result)
        function("ggml_graph_compute_with_ctx", ctypes.c_int, pointer, pointer, ctypes.c_int)(context, graph, 1)
        found = data(result)[:count]
    finally:
        function("ggml_free", None, pointer)(context)
    return any(abs(value - _gelu(x)) > 2.0**-16 * abs(value) for x, value in zip(inputs, found, strict=True))


def _gelu(x: float) -> float:
    """GELU with tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def drafter_window_is_narrow() -> bool:
    """Whether MTP drafters see two tokens fewer in sliding-window layers than in Transformers.

    The drafter's row at position p sees the target's keys back to p - window - 1 in Transformers
    (``create_bidirectional_sliding_window_mask``), to p - window + 1 in llama.cpp (``llama_hparams::is_masked_swa``).
    Runs tiny-31b past its window.
    """
    import polydraft

    with polydraft.load("builtin:tiny-31b", backend="llama_cpp", dtype="float32", device="cpu") as session:
        engine: Any = session.engine
        sequence = engine.open_sequence()
        sampler: Any = _Greedy()
        newest = sequence.prefill(_CONTEXT, sampler).token_ids[0]
        row = sequence.propose(newest, 1, sampler, keep_logits=True).logits.numpy()[0]
        sequence.close()

    def gap(recorded: dict[int, float]) -> float:
        return max(abs(float(row[token]) - value) for token, value in recorded.items())

    return gap(_NARROW) < gap(_UPSTREAM)


class _Greedy:
    needs_prefix = False

    def choose(self, logits: Any, first_position: int, run: Sequence[int], **_: Any) -> tuple[list[int], None]:
        return [int(token) for token in logits.argmax(axis=-1)], None

    def choose_draft(self, logits: Any, position: int, run: Sequence[int] | None = None) -> Any:
        return np.argmax(logits, axis=-1)
