"""llama.cpp's low-level API in the library of xllamacpp's wheel, which needs no compiler.

Structs are passed by value and change with llama.cpp, so only the versions whose headers these were compared with are
used; and what the library says of its own defaults has to be what the structs show.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

__all__ = ["TESTED", "extension", "library"]

TESTED = ("2026.10.11549",)
"""Versions of xllamacpp with these structs: the last number is llama.cpp's build."""


class _ModelParams(Structure):
    _fields_ = (
        ("devices", POINTER(c_void_p)),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class _ContextParams(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", c_int),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "rope_scaling_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "op_offload": True,
    "swa_full": True,
}
"""Values that the library gives its own fields, spread over the structs; all others are 0."""
_CONSTANTS = {
    "LLAMA_CONTEXT_TYPE_MTP": 1,
    "LLAMA_FLASH_ATTN_TYPE_DISABLED": 0,
    "LLAMA_FLASH_ATTN_TYPE_ENABLED": 1,
    "LLAMA_LOAD_MODE_NONE": 0,
    "LLAMA_LOAD_MODE_MMAP": 1,
    "LLAMA_LOAD_MODE_MLOCK": 2,
    "LLAMA_LOAD_MODE_MMAP_MLOCK": 3,
    "LLAMA_SPLIT_MODE_NONE": 0,
    "LLAMA_TOKEN_ATTR_CONTROL": 1 << 3,
}
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    # Result, arguments.
    "llama_backend_init": (None,),
    "llama_batch_free": (None, _Batch),
    "llama_batch_init": (_Batch, c_int32, c_int32, c_int32),
    "llama_context_default_params": (_ContextParams,),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_free": (None, c_void_p),
    "llama_get_logits": (POINTER(c_float), c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_init_from_model": (c_void_p, c_void_p, _ContextParams),
    "llama_log_set": (None, c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_memory_seq_pos_min": (c_int32, c_void_p, c_int32),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_model_default_params": (_ModelParams,),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_has_encoder": (c_bool, c_void_p),
    "llama_model_is_diffusion": (c_bool, c_void_p),
    "llama_model_is_hybrid": (c_bool, c_void_p),
    "llama_model_is_recurrent": (c_bool, c_void_p),
    "llama_model_load_from_file": (c_void_p, c_char_p, _ModelParams),
    "llama_model_n_embd_out": (c_int32, c_void_p),
    "llama_model_n_swa": (c_int32, c_void_p),
    "llama_print_system_info": (c_char_p,),
    "llama_token_to_piece": (c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    "llama_vocab_get_attr": (c_int, c_void_p, c_int32),
    "llama_vocab_get_text": (c_char_p, c_void_p, c_int32),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
}
_EXTENSION: dict[str, tuple[Any, ...]] = {
    # Not in the C API: exported under the names that C++ compilers but Microsoft's give them.
    "llama_get_ctx_other": ("_Z19llama_get_ctx_otherP13llama_context", c_void_p, c_void_p),
    "llama_get_embeddings_nextn": (
        "_Z26llama_get_embeddings_nextnP13llama_context",
        POINTER(c_float),
        c_void_p,
    ),
    "llama_set_embeddings_nextn": (
        "_Z26llama_set_embeddings_nextnP13llama_contextbb",
        None,
        *(c_void_p, c_bool, c_bool),
    ),
}


@cache
def library() -> Any:
    """The functions and constants that the plugin uses, by the names of ``llama_cpp.llama_cpp``.

    Raises:
        ImportError: The library cannot be loaded, or is of a version whose structs are not known.
    """
    installed = version("xllamacpp")
    if installed not in TESTED:
        raise ImportError(f"its structs are known for {', '.join(TESTED)} only")
    import xllamacpp.xllamacpp as native

    loaded = ctypes.CDLL(native.__file__)
    functions = {name: _function(loaded, name, *types) for name, types in _FUNCTIONS.items()}
    given = {
        "llama_context_params": _ContextParams,
        "llama_log_callback": ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p),
        "llama_token": c_int32,
    }
    found = SimpleNamespace(_lib=loaded, **_CONSTANTS, **functions, **given)
    for params, defaults in (
        (found.llama_model_default_params(), _MODEL_DEFAULTS),
        (found.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        if wrong := [name for name, value in defaults.items() if getattr(params, name) != value]:
            raise ImportError(f"its structs are not those of llama.cpp's build: {', '.join(wrong)}")
    return found


@cache
def extension() -> Any:
    """What MTP needs besides; None if the library does not export it."""
    loaded = library()._lib
    try:
        found = {name: _function(loaded, symbol, *types) for name, (symbol, *types) in _EXTENSION.items()}
    except AttributeError:
        return None
    return SimpleNamespace(**found)


def _function(loaded: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    found = loaded[name]  # an object of its own: other users of the library may see other types
    found.restype, found.argtypes = result, list(arguments)
    return found
