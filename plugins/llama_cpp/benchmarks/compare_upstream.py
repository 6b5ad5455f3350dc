"""Speed and acceptance compared with llama-server: the same GGUF files, prompts and k, greedy, in turn.

    export POLYDRAFT_LLAMA_SERVER=/path/to/llama-server
    python plugins/llama_cpp/benchmarks/compare_upstream.py builtin:tiny-e2b --save

``cpu_seconds`` are those of the process that decodes (the server's own from /proc, without our client's): on a machine
with other work they mean more than wall clock. Acceptance must agree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import polydraft
from polydraft_builtin_pairs import prompts

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, in_turn, parser

BACKENDS = {"polydraft": "llama_cpp", "llama-server": "llama-server"}


def main() -> int:
    """Measure each target; the exit code is 1 if acceptance differs by more than 1%."""
    arguments = parser(__doc__)
    arguments.add_argument("targets", nargs="+")
    arguments.add_argument("--drafter", default="auto")
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("-k", type=int, default=4)
    arguments.add_argument("--prompts", type=int, default=12)
    arguments.add_argument("--new-tokens", type=int, default=128)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    texts = [prompt.text for prompt in prompts() if prompt.text][: given.prompts]
    record: Recorder | None = None
    differ = False
    for target in given.targets:
        with ExitStack() as stack:
            sessions = {side: stack.enter_context(_load(backend, target, given)) for side, backend in BACKENDS.items()}
            found = in_turn(
                {side: partial(_run, session, texts, given.new_tokens) for side, session in sessions.items()},
                given.repeats,
            )
            running = {side: session.running for side, session in sessions.items()}
        versions = {each.engine: each.engine_version for each in running.values()}
        record = record or Recorder(__file__, __doc__, given, threads=given.threads, versions=versions)
        equal = sum(ours == theirs for ours, theirs in zip(*(runs[-1][1] for runs in found.values()), strict=True))
        lengths = []
        for side, runs in found.items():
            case = {"pair": target.removeprefix("builtin:"), "dtype": running[side].dtype, "side": side}
            values = {"method": running[side].method, "equal_outputs": equal, "prompts": len(texts)}
            record.row(case, values, {name: [run[0][name] for run in runs] for name in runs[0][0]})
            lengths.append(statistics.median(run[0]["mean_acceptance_length"] for run in runs))
        differ |= abs(lengths[0] - lengths[1]) > 0.01 * lengths[1]
    return int(differ)


def _load(backend: str, target: str, given: argparse.Namespace) -> polydraft.Session:
    return polydraft.load(
        target,
        drafter=given.drafter,
        backend=backend,
        dtype=given.dtype,
        device="cpu",
        num_speculative_tokens=given.k,
        context_length=2048,
        prefix_cache_bytes=0,
        engine_options={"threads": given.threads, "flash_attn": "off"},
    )


def _run(session: polydraft.Session, texts: list[str], new_tokens: int) -> tuple[dict[str, float], list[Any]]:
    """All prompts once: figures, and the outputs."""
    clock = _clock(session)
    start = clock(), time.perf_counter()
    # Not past EOS: the server ends there, and a second request for the rest begins another round.
    results = [session.generate(text, max_new_tokens=new_tokens) for text in texts]
    cpu, seconds = clock() - start[0], time.perf_counter() - start[1]
    stats = [result.stats for result in results]
    tokens, rounds = sum(s.num_tokens for s in stats), sum(s.num_drafts or 0 for s in stats)
    figures = {
        "mean_acceptance_length": 1 + sum(s.num_accepted_tokens or 0 for s in stats) / rounds,
        "tokens_per_second": tokens / seconds,
        "cpu_seconds_per_1000_tokens": 1000 * cpu / tokens,
    }
    return figures, [result.token_ids for result in results]


def _clock(session: Any) -> Callable[[], float]:
    """CPU seconds of the process that decodes for a session."""
    if session.running.backend == "llama_cpp":
        return time.process_time
    status = Path(f"/proc/{session.engine.server.process.pid}/stat")

    def read() -> float:
        fields = status.read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    return read


if __name__ == "__main__":
    raise SystemExit(main())
