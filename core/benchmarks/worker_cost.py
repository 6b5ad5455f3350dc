"""What a worker process costs: tokens per second, time per round, and time to load, against the same engine in process.

    python core/benchmarks/worker_cost.py [--backends reference,transformers] [--save]

First of an engine that computes nothing, whose rounds wait for 0, 1 and 5 milliseconds: what the process itself costs.

Both sessions stay open, and the same outputs are generated in turn. ``added_microseconds_per_round`` is the median
difference of neighbouring runs, and ``added_cpu_microseconds_per_round`` that of the processor time of app and worker,
which other work on the machine does not change; both sides have made the same tokens in the same rounds, which is
checked. Loading is timed in fresh programs, from the call of ``load`` to the first token. The last row is the cost of a
Python logits processor in the app: float32 rows of a round through a pipe and back, as large as Gemma's vocabulary.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polydraft
from polydraft._load import open_session
from polydraft._workers.backend import WorkerBackend
from waiting_engine import RECORD, Waiting, request

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))

from benchmarks import Recorder, in_turn, parser

TARGETS = {
    "reference": "builtin:toy",
    "transformers": "builtin:tiny-e2b",
    "mlx": "builtin:tiny-e2b",
    "llama_cpp": "builtin:tiny-e2b",
}
PROMPT = "def add(self, item):\n    "
VOCABULARY, ROWS = 262_144, 5
LOADS = """
import json, sys, time
import polydraft
target, backend, isolation = sys.argv[1:]
polydraft.default_host().backends()
began = time.perf_counter()
with polydraft.load(target, backend=backend, dtype="float32", isolation=isolation, prefix_cache_bytes=0) as session:
    session.generate([5, 6, 7], max_new_tokens=1)
    print(json.dumps(time.perf_counter() - began))
"""
ECHO = """
import os, sys
left = int(sys.argv[1])
while True:
    data = bytearray()
    while len(data) < left:
        more = os.read(0, 1 << 20)
        if not more:
            sys.exit()
        data += more
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]
"""


def real(backend: str) -> dict[str, polydraft.Session]:
    """An engine in this process and in a worker."""
    sides = {"process": "none", "worker": "process"}
    return {
        name: polydraft.load(
            TARGETS[backend], backend=backend, dtype="float32", isolation=isolation, prefix_cache_bytes=0
        )
        for name, isolation in sides.items()
    }


def waiting(milliseconds: float) -> dict[str, polydraft.Session]:
    """The engine that computes nothing, in this process and in a worker."""
    backends = {"process": Waiting(), "worker": WorkerBackend(RECORD, reason="It is measured.")}
    return {name: open_session(backend, request(milliseconds)) for name, backend in backends.items()}


def generating(
    sessions: dict[str, polydraft.Session], tokens: int, repeats: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Values and runs of one engine, on both sides."""
    pid = sessions["worker"].running.process_id

    def run(name: str) -> tuple[float, float, Any]:
        began, cpu = time.perf_counter(), time.process_time() + _cpu_of(pid)
        result = sessions[name].generate(PROMPT, max_new_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - began, time.process_time() + _cpu_of(pid) - cpu, result

    found = in_turn({name: lambda name=name: run(name) for name in sessions}, repeats)  # type: ignore[misc]
    outputs = {result.token_ids for runs in found.values() for *_, result in runs}
    assert len(outputs) == 1, "both sides must do the same work"
    rounds = found["process"][0][-1].stats.num_target_steps

    def added(at: int) -> float:
        pairs = zip(found["process"], found["worker"], strict=True)
        return statistics.median((worker[at] - own[at]) / rounds * 1e6 for own, worker in pairs)

    seconds = {name: [run[0] for run in runs] for name, runs in found.items()}
    ratios = [worker / own for own, worker in zip(seconds["process"], seconds["worker"], strict=True)]
    for session in sessions.values():
        session.close()
    values = {
        "rounds": rounds,
        "added_microseconds_per_round": round(added(0), 1),
        "added_cpu_microseconds_per_round": round(added(1), 1),
        "time_ratio": round(statistics.median(ratios), 4),
        "tokens_per_second": round(tokens / statistics.median(seconds["process"]), 1),
        "tokens_per_second_worker": round(tokens / statistics.median(seconds["worker"]), 1),
    }
    return values, {"seconds": seconds["process"], "seconds_worker": seconds["worker"]}


def _cpu_of(pid: int | None) -> float:
    """Processor seconds that a process has used, on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loading(backend: str, repeats: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Seconds from ``load`` to the first token, in fresh programs."""

    def run(isolation: str) -> tuple[float, float]:
        command = [sys.executable, "-c", LOADS, TARGETS[backend], backend, isolation]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return float(json.loads(done.stdout.splitlines()[-1])), cpu

    found = in_turn({name: lambda name=name: run(name) for name in ("none", "process")}, repeats)  # type: ignore[misc]
    own, worker = ([statistics.median(run[at] for run in found[name]) for at in (0, 1)] for name in found)
    values = {
        "added_load_seconds": round(worker[0] - own[0], 3),
        "load_cpu_seconds": round(own[1], 3),
        "added_load_cpu_seconds": round(worker[1] - own[1], 3),
    }
    return values, {"load_seconds": [run[0] for run in found["none"]]}


def logits_across(repeats: int) -> dict[str, list[float]]:
    """Milliseconds for the rows of a round through a pipe and back."""
    size = ROWS * VOCABULARY * 4
    echo = subprocess.Popen([sys.executable, "-c", ECHO, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert echo.stdin is not None
    assert echo.stdout is not None
    rows, runs = bytes(size), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        view = memoryview(rows)
        while view:
            view = view[os.write(echo.stdin.fileno(), view) :]
        left = size
        while left:
            left -= len(os.read(echo.stdout.fileno(), 1 << 20))
        runs.append((time.perf_counter() - began) * 1000)
    echo.stdin.close()
    echo.wait()
    echo.stdout.close()
    return {"milliseconds_per_round": runs[1:]}


def main() -> None:
    """Measure each backend, then the pipe."""
    made = parser(str(__doc__))
    made.add_argument("--backends", default="reference,transformers", help="those that are installed here")
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--repeats", type=int, default=9)
    made.add_argument("--loads", type=int, default=3)
    given = made.parse_args()
    backends = given.backends.split(",")
    packages = [f"polydraft-{name.replace('_', '-')}" for name in backends]
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or None
    recorder = Recorder(__file__, str(__doc__), given, packages=packages, threads=threads)
    for milliseconds in (0, 1, 5):
        values, runs = generating(waiting(milliseconds), given.tokens, given.repeats)
        case = {"what": "worker", "backend": "none", "target": f"rounds of {milliseconds} ms"}
        recorder.row(case, values, runs)
    for backend in backends:
        values, runs = generating(real(backend), given.tokens, given.repeats)
        more, loads = loading(backend, given.loads) if given.loads else ({}, {})
        recorder.row(
            {"what": "worker", "backend": backend, "target": TARGETS[backend]}, {**values, **more}, runs | loads
        )
    runs = logits_across(given.repeats)
    recorder.row({"what": "logits across", "backend": "none", "target": f"{ROWS} rows of {VOCABULARY}"}, {}, runs)


if __name__ == "__main__":
    main()
