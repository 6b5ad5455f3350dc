"""What a user is told of an engine that did not start."""

import pytest
from polydraft.errors import InvalidRequestError, ModelFormatError, OutOfMemoryError
from polydraft_vllm import resources
from polydraft_vllm.environment import server_environment
from polydraft_vllm.start_errors import server_start_error, start_error

GREW = (
    "Error in memory profiling. Initial free memory 138.49 GiB, current free memory 138.97 GiB. This happens when "
    "other processes sharing the same container release GPU memory while vLLM is profiling during initialization."
)


@pytest.mark.parametrize(
    ("error", "kind", "hint"),
    [
        (AssertionError(GREW), OutOfMemoryError, "other programs"),
        (ValueError("No available memory for the cache blocks."), OutOfMemoryError, "context_length"),
        (ValueError("Model architectures ['X'] are not supported for now."), ModelFormatError, "architecture"),
        (ValueError("max_num_batched_tokens is too small"), InvalidRequestError, "option"),
    ],
)
def test_the_reason_and_what_to_do(error, kind, hint):
    found = start_error(error, "a/b")
    assert type(found) is kind
    assert str(error).partition(". ")[0].rstrip(".") in str(found)
    assert hint in found.hint


def test_a_server_names_it_in_its_log():
    log = f"(EngineCore_0 pid=1) ERROR 11-27 [core.py:936] AssertionError: {GREW}\n"
    assert "other programs" in server_start_error("a/b", log).hint


def test_products_of_float32_are_float32_unless_the_user_asks_for_less(monkeypatch):
    # Without it Triton's attention kernels, vLLM's only ones in float32 on GPUs, round to TF32.
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    ours = server_environment(cpu=False)
    assert resources.matmul_precision("float32", "cuda:0", ours) is None
    assert resources.matmul_precision("float32", "cuda:0", {}) == "tf32"
    assert resources.matmul_precision("float32", "cuda:0", {**ours, "VLLM_FLOAT32_MATMUL_PRECISION": "high"}) == "tf32"
    assert resources.matmul_precision("float32", "cpu", {}) is None
    assert resources.matmul_precision("bfloat16", "cuda:0", {}) is None
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    assert resources.matmul_precision("float32", "cuda:0", server_environment(cpu=False)) == "tf32"
