"""What the times of calls say: seconds for a token, without what other programs took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import median

from polydraft._measuring.bench import Sample

__all__ = ["seconds_per_token", "undisturbed", "usual"]


def usual(values: Iterable[float]) -> float:
    """The lower quartile: of up to four calls the fastest. What disturbs a machine only makes calls slower."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 4]


def undisturbed(samples: Iterable[Sample]) -> Callable[[Sample], float]:
    """How long a call would take if no other program used the processor, as far as that can be told.

    An engine that computes in its process, on the processor, uses it all the time, with one thread or several. Where it
    got less than in its best calls, it has waited for other programs: the call counts with the processor time alone.

    Args:
        samples: Calls of one process.
    """
    used = sorted(one.cpu_seconds / one.seconds for one in samples if one.cpu_seconds and one.seconds > 0)
    # One thread uses one processor; of several, few calls are so disturbed that this is not seen.
    threads = max(1.0, used[(len(used) - 1) * 9 // 10]) if used else 1.0
    return lambda sample: min(sample.seconds, sample.cpu_seconds / threads) if sample.cpu_seconds else sample.seconds


def seconds_per_token(
    samples: Mapping[tuple[int, int], Sample],
    of: Callable[[Iterable[float]], float],
    seconds: Callable[[Sample], float],
) -> float:
    """Over all prompts, of whose calls ``of`` makes one number; ``seconds`` says how long a call took."""
    by_prompt: dict[int, list[Sample]] = {}
    for (prompt, _), sample in samples.items():
        by_prompt.setdefault(prompt, []).append(sample)
    # Cut outputs are shorter: a prompt counts with the length that its outputs usually have.
    lengths = {prompt: median(one.num_tokens for one in found) for prompt, found in by_prompt.items()}
    total = sum(
        lengths[prompt] * of(seconds(one) / max(one.num_tokens, 1) for one in found)
        for prompt, found in by_prompt.items()
    )
    return total / max(sum(lengths.values()), 1)
