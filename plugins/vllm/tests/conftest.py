"""What the tests of the vLLM backend share: sessions of real engines on the built-in pairs."""

from __future__ import annotations

import gc

import polydraft
import pytest


@pytest.fixture(scope="session")
def mtp():
    """The session that most tests share. Its batches are small, so that long prompts come in chunks."""
    options = {"max_num_batched_tokens": 128, "max_num_seqs": 16}
    with polydraft.load(
        "builtin:tiny-e2b", backend="vllm", dtype="float32", num_speculative_tokens=4, engine_options=options
    ) as session:
        yield session
    gc.collect()
