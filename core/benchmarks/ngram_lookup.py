"""Cost of n-gram drafting on long contexts: building the index, and one round. Prints medians as JSON.

python core/benchmarks/ngram_lookup.py --tokens 100000 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING

from polydraft._loop.ngram import NgramDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _different(count: int) -> list[int]:
    """Tokens of a large vocabulary with hardly any repetition: the most memory, no drafts."""
    random_ids = random.Random(0)
    return [random_ids.randrange(262_144) for _ in range(count)]


def _zipf(count: int) -> list[int]:
    """Tokens as frequent as words are (Zipf's law): many short matches."""
    weights = [1 / rank for rank in range(1, 20_001)]
    return random.Random(0).choices(range(20_000), weights, k=count)


def _periodic(count: int) -> list[int]:
    """A text that repeats itself: every n-gram was there before."""
    return [index % 997 for index in range(count)]


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _built(token_ids: Sequence[int]) -> NgramDrafter:
    drafter = NgramDrafter()
    drafter.extend(token_ids)
    return drafter


def _peak_bytes(token_ids: Sequence[int]) -> int:
    tracemalloc.start()
    drafter = _built(token_ids)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del drafter
    return used


def _rounds(drafter: NgramDrafter, count: int, k: int) -> None:
    """Rounds as the loop drives them: propose k, then take two of its tokens (or others) as emitted."""
    for index in range(count):
        proposal = drafter.propose(k)
        drafter.extend(proposal[:2] or [index % 1000])


def measure(tokens: int, repeats: int, rounds: int, k: int) -> dict[str, object]:
    """Medians over ``repeats`` for each kind of text."""
    texts: dict[str, dict[str, float]] = {}
    for name, make in {"different": _different, "zipf": _zipf, "periodic": _periodic}.items():
        token_ids = make(tokens)
        drafter = _built(token_ids)
        texts[name] = {
            "build_seconds": statistics.median(_timed(lambda: _built(token_ids)) for _ in range(repeats)),  # noqa: B023
            "round_microseconds": statistics.median(
                _timed(lambda: _rounds(drafter, rounds, k)) / rounds * 1e6  # noqa: B023
                for _ in range(repeats)
            ),
            "memory_megabytes": _peak_bytes(token_ids) / 1e6,
        }
    return {
        "tokens": tokens,
        "repeats": repeats,
        "rounds": rounds,
        "k": k,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "texts": texts,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("-k", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.tokens, arguments.repeats, arguments.rounds, arguments.k), indent=2))
