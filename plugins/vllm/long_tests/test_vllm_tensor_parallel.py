"""More than one worker: tensor parallelism over the multiprocess executor, and what the CPU build says of Ray."""

import polydraft
import pytest
from polydraft.errors import UnsupportedError

PROMPTS = ("def read_lines(path):\n", "class Stack:\n    ", 'def add(first, second):\n    """Return."""\n' * 30)
GREEDY = {"max_new_tokens": 48, "ignore_eos": True}
SMALL = {"kv_cache_memory_bytes": 1 << 26}
NEAR = 1e-3
"""Nats: float32 sums that are split over two workers differ by less."""


def load(target, drafter="auto", **options):
    return polydraft.load(
        target,
        drafter=drafter,
        backend="vllm",
        dtype="float32",
        num_speculative_tokens=4,
        context_length=1024,
        engine_options={**SMALL, **options},
    )


def verdict(one, two):
    """``EXACT``, ``NEAR_TIE`` or ``DIVERGED``; ``one`` has log-probabilities of several best tokens."""
    for index, (wanted, found) in enumerate(zip(one.token_ids, two.token_ids, strict=True)):
        if wanted != found:
            best = dict(one.logprobs[index].top)
            return "NEAR_TIE" if found in best and best[wanted] - best[found] < NEAR else "DIVERGED"
    return "EXACT"


@pytest.mark.parametrize(
    ("target", "drafter"), [("builtin:tiny-e2b", "auto"), ("builtin:tiny-llama", "ngram")], ids=["mtp", "ngram"]
)
def test_two_workers_give_what_one_gives(target, drafter):
    with load(target, drafter) as session:
        wanted = [session.generate(prompt, logprobs=8, **GREEDY) for prompt in PROMPTS]
    with load(target, drafter, tensor_parallel_size=2, distributed_executor_backend="mp") as session:
        assert any("2 workers (mp)" in note for note in session.running.notes)
        found = session.generate_many(PROMPTS, **GREEDY)
        plain = session.generate(PROMPTS[0], speculate="off", **GREEDY)
        sampled = session.generate(PROMPTS[0], temperature=1.0, seed=3, **GREEDY)
    verdicts = [verdict(*pair) for pair in zip(wanted, found, strict=True)]
    assert "DIVERGED" not in verdicts, verdicts
    assert verdict(wanted[0], plain) != "DIVERGED"
    assert all(result.stats.num_accepted_tokens > 0 for result in found)
    assert sampled.stats.num_draft_tokens > 0  # the self-test ran in both workers


def test_ray_is_not_for_the_cpu_build():
    """vLLM's CPU platform has no Ray device ("current platform cpu does not support ray"): refused before any work."""
    from vllm.platforms import current_platform

    with pytest.raises(UnsupportedError, match="CPU build"):
        load("builtin:tiny-e2b", tensor_parallel_size=2, distributed_executor_backend="ray")
    assert not current_platform.ray_device_key, "vLLM's CPU build takes Ray now: the refusal can go."
