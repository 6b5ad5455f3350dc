"""A loaded GGUF file."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from polydraft.errors import ModelFormatError, UnsupportedError

from polydraft_llama_cpp.bindings import engine_name, library, recent_errors
from polydraft_llama_cpp.resources import Device

__all__ = ["Model"]


class Model:
    """Weights and vocabulary. ``free`` after every context made of it.

    Args:
        path: The file; of a split model its first part.
        name: What to call it in messages.
        device: The one device to load it to. None: where llama.cpp loads it, which is all GPUs.
        n_gpu_layers: Layers on the GPU; -1: all.
        mmap: Map the file instead of reading it.
        mlock: Keep the weights in memory.
        vocab_only: Load no weights.

    Raises:
        ModelFormatError: llama.cpp rejects the file; its own words are in the message.
        UnsupportedError: It is not a decoder-only model.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        device: Device | None = None,
        n_gpu_layers: int = 0,
        mmap: bool = True,
        mlock: bool = False,
        vocab_only: bool = False,
    ) -> None:
        lib = library()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.vocab_only = vocab_only
        mode = {(True, False): "MMAP", (False, True): "MLOCK", (True, True): "MMAP_MLOCK"}.get((mmap, mlock), "NONE")
        params.load_mode = getattr(lib, f"LLAMA_LOAD_MODE_{mode}")
        # For the CPU an empty list: without one, llama.cpp would still run large matrix products on GPUs.
        chosen = [] if device is None or device.is_cpu else [device.handle]
        # The list ends with a null pointer.
        handles = (ctypes.c_void_p * (len(chosen) + 1))(*chosen, None)
        if device is not None:
            field = dict(type(params)._fields_)["devices"]
            params.devices = ctypes.cast(handles, field)
            if chosen:
                params.split_mode = lib.LLAMA_SPLIT_MODE_NONE
        recent_errors(forget=True)
        self.pointer: Any = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise ModelFormatError(
                f"llama.cpp cannot load {name}: {recent_errors() or 'it gives no reason'}.",
                f"Check that the file is complete, and that the installed {engine_name()} knows its architecture.",
            )
        if not vocab_only and (lib.llama_model_has_encoder(self.pointer) or lib.llama_model_is_diffusion(self.pointer)):
            self.free()
            raise UnsupportedError(
                f"{name} does not generate text token by token: it has an encoder, or is a diffusion model.",
                "Give the GGUF file of a decoder-only language model.",
            )
        self.name = name
        self.vocab: Any = lib.llama_model_get_vocab(self.pointer)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self.vocab))
        # Width of output rows; an assistant's are as wide as its target's, not as its own layers.
        self.hidden_size = int(lib.llama_model_n_embd_out(self.pointer))
        self.window = int(lib.llama_model_n_swa(self.pointer))
        self.is_recurrent = bool(lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer))
        """Whether it has a recurrent state, which llama.cpp cannot restore: drafts cannot be rolled back."""

    def free(self) -> None:
        """Free it. May be called twice."""
        if self.pointer:
            library().llama_model_free(self.pointer)
            self.pointer = None
