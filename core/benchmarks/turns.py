"""The time to the first token of each turn of a conversation, with the KV of earlier turns and without.

    python core/benchmarks/turns.py --backend transformers --target builtin:tiny-e2b --save

Two sessions hold the same conversation, turn by turn, one of them with ``prefix_cache_bytes=0``. Each repeat is another
conversation, so that neither session knows its start. Seconds are the process's CPU time, which other programs hardly
change, unless ``--clock wall``; an engine in a process of its own needs that.
"""

from __future__ import annotations

import json
import random
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import polydraft

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
from benchmarks import Recorder, parser

SIDES = {"reused": None, "run again": 0}


def main() -> None:
    """Hold the conversations."""
    options = parser(__doc__)
    options.add_argument("--backend", default="transformers")
    options.add_argument("--target", default="builtin:tiny-e2b")
    options.add_argument("--drafter", default="auto")
    options.add_argument("--engine-options", default="{}", metavar="JSON")
    options.add_argument("--prompt", type=int, default=400, help="tokens of the first prompt")
    options.add_argument("--more", type=int, default=16, help="new tokens of each further turn")
    options.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    options.add_argument("--turns", type=int, default=6)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    given = options.parse_args()
    record = Recorder(__file__, __doc__, given)
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    with ExitStack() as stack:
        sessions = {
            side: stack.enter_context(
                polydraft.load(
                    given.target,
                    backend=given.backend,
                    drafter=given.drafter,
                    engine_options=json.loads(given.engine_options),
                    prefix_cache_bytes=limit,
                )
            )
            for side, limit in SIDES.items()
        }
        size = min(session.tokenizer.vocab_size for session in sessions.values())
        seconds: dict[tuple[str, int], list[float]] = {}
        reused: dict[int, int | None] = {}
        for repeat in range(given.repeats + 1):
            draw = random.Random(repeat)
            prompt = [draw.randrange(size) for _ in range(given.prompt)]
            for turn in range(1, given.turns + 1):
                sides = list(sessions.items())
                answer: tuple[int, ...] = ()
                for side, session in sides if repeat % 2 else reversed(sides):
                    taken, result = first_token(session, prompt, given.tokens, clock)
                    answer = result.token_ids
                    if repeat:  # the first time includes one-time work
                        seconds.setdefault((side, turn), []).append(taken)
                    if side == "reused":
                        reused[turn] = result.stats.num_reused_tokens
                prompt = [*prompt, *answer, *(draw.randrange(size) for _ in range(given.more))]
        for turn in range(1, given.turns + 1):
            for side in SIDES:
                record.row(
                    {"backend": given.backend, "target": given.target, "turn": turn, "side": side},
                    {"reused_tokens": reused[turn] if side == "reused" else 0},
                    {"milliseconds_to_first_token": [1e3 * one for one in seconds[side, turn]]},
                )


def first_token(session: Any, prompt: list[int], tokens: int, clock: Any) -> tuple[float, Any]:
    """Seconds to the first chunk, and the result."""
    with closing(session.stream(prompt, max_new_tokens=tokens, ignore_eos=True)) as stream:
        started = clock()
        next(stream)
        taken = clock() - started
        for _ in stream:
            pass
    return taken, stream.result


if __name__ == "__main__":
    main()
