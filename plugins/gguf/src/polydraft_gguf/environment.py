"""What llama.cpp reads from its process's environment, and must be told for right results."""

from __future__ import annotations

import os

__all__ = ["needed_environment", "set_needed_environment"]

_NEEDED = {
    # On NVIDIA GPUs from Hopper on, llama.cpp starts a kernel before the one that it reads from has ended (programmatic
    # dependent launch, llama.cpp's pull request 22522). Where CUDA graphs are cut by what runs on the CPU, as flash
    # attention for heads without a kernel does, logits of single rows were then off by 4.5 of 14, in 1,302 of 1,381
    # steps of one row (llama-cpp-python 0.3.36 on an H100, 16-bit cache); without it in none of 1,630.
    "GGML_CUDA_PDL": "0",
}


def needed_environment() -> dict[str, str]:
    """What is missing in this process's environment; what the user has set stays."""
    return {name: value for name, value in _NEEDED.items() if name not in os.environ}


def set_needed_environment() -> None:
    """Set it for llama.cpp in this process, which reads it with its first kernel."""
    os.environ.update(needed_environment())
