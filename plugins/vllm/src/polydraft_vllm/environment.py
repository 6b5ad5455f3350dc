"""Environment variables that must be set before vLLM is imported."""

from __future__ import annotations

import os

__all__ = ["prepare_environment", "server_environment"]

_DEFAULTS = {
    # By default vLLM logs to standard output, where programs write their results.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # A library does not send usage reports unless the user asks for it.
    "VLLM_NO_USAGE_STATS": "1",
    # The scheduler ends requests whose logits are not finite (see ``soundness``).
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    # Triton would round float32 factors to TF32, and vLLM's attention in float32 is Triton's on GPUs.
    "TRITON_F32_DEFAULT": "ieee",
}
_CPU_DEFAULTS = {
    # Binding threads to cores would restrict the whole process to them, the app's other threads included.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def prepare_environment(*, cpu: bool) -> None:
    """Set what the in-process engine (``cpu``: of a CPU build) needs. The user's variables are kept, but for one."""
    for name, value in {**_DEFAULTS, **(_CPU_DEFAULTS if cpu else {})}.items():
        os.environ.setdefault(name, value)
    # The scheduler must run in this process, to report what each round drafted. On CPU vLLM would also put a single
    # worker into a separate process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def server_environment(*, cpu: bool) -> dict[str, str]:
    """Environment variables that a server (``cpu``: of a CPU build) gets in addition to this process's."""
    defaults = {**_DEFAULTS, "VLLM_LOGGING_LEVEL": "INFO", **(_CPU_DEFAULTS if cpu else {})}
    del defaults["VLLM_LOGGING_STREAM"]
    kept = {name: os.environ.get(name, value) for name, value in defaults.items()}
    return {**kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
