"""This backend beside llama-server: the same GGUF files, prompts and k. Acceptance must agree.

    POLYDRAFT_LLAMA_SERVER=/path/to/llama-server python plugins/llama_cpp/benchmarks/peer.py builtin:tiny-e2b

Both run greedily, in turn, several times; medians are printed as JSON. ``cpu_seconds`` is that of the process that
decodes (the server's own from /proc, without our client's): on a machine with other work it says more than wall clock.
``load_average`` is that of the minute before: 1 is this program.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polydraft
from polydraft_builtin_pairs import prompts

BACKENDS = ("llama_cpp", "llama-server")


def main() -> int:
    """Measure and print; the exit code is 1 if acceptance differs by more than 1%."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    texts = [prompt.text for prompt in prompts() if prompt.text][: given.prompts]
    report: dict[str, Any] = {
        "processor": _processor(),
        "load_average": [round(os.getloadavg()[0], 2)],
        **{name: getattr(given, name) for name in ("threads", "dtype", "k", "new_tokens", "repeats")},
        "targets": {},
    }
    for target in given.targets:
        report["targets"][target.removeprefix("builtin:")] = _measure(target, texts, given)
    report["load_average"].append(round(os.getloadavg()[0], 2))
    print(json.dumps(report, indent=1))
    lengths = [[found[name]["mean_acceptance_length"] for name in BACKENDS] for found in report["targets"].values()]
    return int(any(abs(ours - theirs) > 0.01 * theirs for ours, theirs in lengths))


def _measure(target: str, texts: list[str], given: argparse.Namespace) -> dict[str, Any]:
    sessions = {
        name: polydraft.load(
            target,
            drafter=given.drafter,
            backend=name,
            dtype=given.dtype,
            device="cpu",
            num_speculative_tokens=given.k,
            context_length=2048,
            engine_options={"threads": given.threads, "flash_attn": "off"},
        )
        for name in BACKENDS
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    outputs: dict[str, list[tuple[int, ...]]] = {}
    try:
        for _ in range(given.repeats):
            for name, session in sessions.items():
                clock = _clock(session)
                # Not past EOS: the server ends there, and a second request for the rest begins another round.
                settings = {"max_new_tokens": given.new_tokens}
                start = clock(), time.perf_counter()
                results = [session.generate(text, **settings) for text in texts]
                spent = clock() - start[0], time.perf_counter() - start[1]
                stats = [result.stats for result in results]
                tokens, rounds = sum(s.num_tokens for s in stats), sum(s.num_drafts or 0 for s in stats)
                accepted = sum(s.num_accepted_tokens or 0 for s in stats)
                runs[name].append(
                    {
                        "mean_acceptance_length": 1 + accepted / rounds,
                        "tokens_per_second": tokens / spent[1],
                        "cpu_seconds_per_1000_tokens": 1000 * spent[0] / tokens,
                    }
                )
                outputs[name] = [result.token_ids for result in results]
        running = {name: session.running.model_dump(mode="json") for name, session in sessions.items()}
    finally:
        for session in sessions.values():
            session.close()
    found: dict[str, Any] = {
        name: {key: round(statistics.median(run[key] for run in of_name), 4) for key in of_name[0]}
        for name, of_name in runs.items()
    }
    for name in BACKENDS:
        found[name]["running"] = {key: running[name][key] for key in ("engine_version", "dtype", "method")}
    return {
        **found,
        "equal_outputs": sum(a == b for a, b in zip(*outputs.values(), strict=True)),
        "prompts": len(texts),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else "unknown"


def _clock(session: Any) -> Callable[[], float]:
    """CPU seconds of the process that decodes for a session."""
    if session.running.backend == "llama_cpp":
        return time.process_time
    status = Path(f"/proc/{session.drafting_process}/stat")

    def read() -> float:
        fields = status.read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    return read


if __name__ == "__main__":
    raise SystemExit(main())
