"""What llama.cpp reads from its process's environment, and must be told for right results."""

from __future__ import annotations

import os

__all__ = ["needed_environment", "set_needed_environment"]

_NEEDED = {
    # On NVIDIA GPUs from Hopper on, llama.cpp starts a kernel before the one that it reads from has ended (programmatic
    # dependent launch, llama.cpp's pull request 22522). With a 16-bit KV cache, flash attention and CUDA graphs, all
    # usual there, logits of single rows were then off by 4.5 of 14 (llama-cpp-python 0.3.36, H100 and H200).
    "GGML_CUDA_PDL": "0",
}


def needed_environment() -> dict[str, str]:
    """What is missing in this process's environment; what the user has set stays."""
    return {name: value for name, value in _NEEDED.items() if name not in os.environ}


def set_needed_environment() -> None:
    """Set it for llama.cpp in this process, which reads it with its first kernel."""
    os.environ.update(needed_environment())
