"""``num_speculative_tokens="auto"`` against each fixed k and plain decoding, by class of prompts.

python core/benchmarks/k_schedule.py --backend transformers --target builtin:tiny-e2b --save

All sessions are open at once and take turns at each prompt. Seconds are the process's CPU time, which other programs
hardly change, unless ``--clock wall``; the schedule itself always goes by the clock on the wall.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import polydraft

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
from benchmarks import Recorder, parser

PROMPTS = {
    "code": (
        "def rgb_to_hls(r, g, b):\n    maxc = max(r, g, b)\n    minc = min(r, g, b)\n",
        'class Queue:\n    """A queue of items."""\n\n    def __init__(self, maxsize=0):\n',
    ),
    "prose": (
        "The river rose in the night, and by the morning the road to the village lay under water. Nobody ",
        "This module implements functions that are useful for working with dates. In most cases the caller ",
    ),
    "list": (
        "Colours of the rainbow:\n1. red\n2. orange\n3. yellow\n4. ",
        "| name | size | date |\n|---|---|---|\n| a | 10 | 2020 |\n| b | 20 | 2021 |\n| c | ",
    ),
    "chat": (
        [{"role": "user", "content": "What does os.path.join do?"}],
        [{"role": "user", "content": "Tell me how to open a file and read its lines."}],
    ),
}


def main() -> None:
    """Measure each class of prompts with each k."""
    options = parser(__doc__)
    options.add_argument("--backend", default="transformers")
    options.add_argument("--target", default="builtin:tiny-e2b")
    options.add_argument("--drafter", default="auto")
    options.add_argument("--engine-options", default="{}", metavar="JSON")
    options.add_argument("--ks", type=int, nargs="+", default=list(range(1, 9)))
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    given = options.parse_args()
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    record = Recorder(__file__, __doc__, given)
    with ExitStack() as stack:
        sessions = {
            str(k): stack.enter_context(
                polydraft.load(
                    given.target,
                    backend=given.backend,
                    drafter=given.drafter,
                    num_speculative_tokens=k,
                    engine_options=json.loads(given.engine_options),
                    prefix_cache_bytes=0,  # each prompt is repeated
                )
            )
            for k in ("auto", *given.ks)
        }
        for name, prompts in PROMPTS.items():
            # Plain decoding is timed on the session that the schedule runs on.
            ks = ["0", *map(str, given.ks), "auto"]
            runs: dict[str, list[float]] = {k: [] for k in ks}
            for repeat in range(given.repeats + 1):
                totals = dict.fromkeys(ks, 0.0)
                for number, prompt in enumerate(prompts):
                    for turn in range(len(ks)):
                        k = ks[(turn + repeat + number) % len(ks)]
                        started = clock()
                        result = sessions["auto" if k == "0" else k].generate(
                            prompt,
                            max_new_tokens=given.tokens,
                            temperature=given.temperature,
                            seed=repeat,
                            ignore_eos=True,
                            speculate="off" if k == "0" else "auto",
                        )
                        totals[k] += (clock() - started) / (result.stats.num_tokens - 1)
                for k in ks if repeat else ():  # the first time includes one-time work
                    runs[k].append(totals[k] / len(prompts) * 1e3)
            medians = {k: statistics.median(values) for k, values in runs.items()}
            best = min(ks[:-1], key=medians.__getitem__)
            for k in ks:
                record.row(
                    {"backend": given.backend, "target": given.target, "prompts": name, "k": k},
                    {
                        "milliseconds_per_token": round(medians[k], 3),
                        "over_best_percent": round(100 * (medians[k] / medians[best] - 1), 1),
                        "over_plain_percent": round(100 * (medians[k] / medians["0"] - 1), 1),
                    },
                    {"milliseconds_per_token": runs[k]} if k in ("0", best, "auto") else None,
                )


if __name__ == "__main__":
    main()
