"""Cost of n-gram drafting on long contexts, in CPU time: building the index, and one round.

python core/benchmarks/ngram_lookup.py --tokens 100000 --repeats 5 --save
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from pathlib import Path

from polydraft._loop.ngram import NgramDrafter

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
from collections.abc import Callable, Sequence

from benchmarks import Recorder, parser


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
    started = time.process_time()
    action()
    return time.process_time() - started


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


def main() -> None:
    """Measure each kind of text."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=100_000)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--rounds", type=int, default=1000)
    options.add_argument("-k", type=int, default=5)
    given = options.parse_args()
    record = Recorder(__file__, __doc__, given)
    for name, make in {"different": _different, "zipf": _zipf, "periodic": _periodic}.items():
        token_ids = make(given.tokens)
        drafter = _built(token_ids)
        runs = {"build_seconds": [], "round_microseconds": []}
        for _ in range(given.repeats):
            runs["build_seconds"].append(_timed(lambda: _built(token_ids)))  # noqa: B023
            rounds = _timed(lambda: _rounds(drafter, given.rounds, given.k))  # noqa: B023
            runs["round_microseconds"].append(rounds / given.rounds * 1e6)
        record.row({"text": name}, {"memory_megabytes": round(_peak_bytes(token_ids) / 1e6, 2)}, runs)


if __name__ == "__main__":
    main()
