"""What a pair takes: said in words, and refused where it does not fit."""

import logging

import pytest
from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan
from polydraft.engine_parts.memory import MemoryEstimate, expected_tokens
from polydraft.errors import ContextLengthError, OutOfMemoryError

GIB = 2**30
LOGGER = "polydraft.progress.memory"


def asked(longest=131072, **given):
    target = ModelSource(id="a/b", kind="local", format="safetensors", config={"max_position_embeddings": longest})
    return LoadRequest(backend="any", target=target, plan=SpeculationPlan(), **given)


def test_tokens_that_room_is_counted_for():
    assert [expected_tokens(asked()), expected_tokens(asked(longest=100))] == [4096, 100]
    assert expected_tokens(asked(context_length=32768)) == 32768
    with pytest.raises(ContextLengthError):
        expected_tokens(asked(longest=100, context_length=101))


def test_it_is_said_in_words(caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        MemoryEstimate(14 * GIB, GIB, 32768, work=GIB // 2).announce(asked(), "cuda:0", 80 * GIB)
        MemoryEstimate(14 * GIB, GIB, 10).announce(asked(), "the GPU", None)
        MemoryEstimate(1000, 1000, 10).announce(asked(), "cpu", GIB)  # fits everywhere
    assert caplog.messages == [
        "a/b needs about 15.5 GiB on cuda:0: 14.0 GiB of weights, 1.0 GiB for the KV of 32768 tokens and 512.0 MiB to "
        "run a prompt; 80.0 GiB are free",
        "a/b needs about 15.0 GiB on the GPU: 14.0 GiB of weights and 1.0 GiB for the KV of 10 tokens",
    ]


def test_what_does_not_fit_is_refused():
    estimate = MemoryEstimate(10 * GIB, 4 * GIB, 9000, work=GIB)
    estimate.check_fits(asked(), "cpu", 10 * GIB)  # a context that nobody asked for may be smaller
    estimate.check_fits(asked(context_length=9000), "cpu", 14 * GIB)
    for given, free, words in (
        ({}, 10 * GIB - 1, "weights need about 10.0 GiB, and cpu has 10.0 GiB free"),
        ({"context_length": 9000}, 14 * GIB - 1, "A context of 9000 tokens needs about 4.0 GiB next to 10.0 GiB"),
        ({"context_length": 9000, "prefix_cache_bytes": GIB}, 14 * GIB, f"`prefix_cache_bytes={GIB}` needs about 5.0"),
    ):
        with pytest.raises(OutOfMemoryError, match=words):
            estimate.check_fits(asked(**given), "cpu", free)
