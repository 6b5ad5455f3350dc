"""What choosing tokens costs in a round of this engine at Gemma 4 E2B's shape (35 layers, 262,144 tokens, Q8_0).

    python plugins/llama_cpp/benchmarks/choosing_cost.py /tmp/e2b-shape --threads 2 --save

The weights are random (``e2b_shape.py``, 5 GB written once), so that every draft is rejected: a round is one step of
k+1 rows and k draft steps. Random weights give flat logits too: the worst case for sampling. Measured is the CPU
time of the process in a round, the share of choosing (target's rows and drafts), and the rest of Python.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import polydraft
from e2b_shape import write_pair
from polydraft_llama_cpp import context

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, parser

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0, "seed": 1},
    "temperature 1, top_k 64, top_p 0.95": {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "seed": 1},
}


class Clock:
    """CPU time of this process that passes in calls of some functions: other processes do not count."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Any) -> Any:
        """The function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.process_time() - start

        return timed


def main() -> None:
    """Measure each setting."""
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=8)
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    target, drafter = write_pair(given.folder)
    decode = Clock()
    context.Context.decode = decode.wrap(context.Context.decode)  # type: ignore[method-assign]
    options = {"threads": given.threads, "flash_attn": "off"}
    with polydraft.load(
        target,
        drafter=drafter,
        backend="llama_cpp",
        device="cpu",
        context_length=1024,
        prefix_cache_bytes=0,
        num_speculative_tokens=4,
        engine_options=options,
    ) as session:
        running = {"dtype": session.running.dtype, "device": session.running.device}
        packages = ("llama-cpp-python", "numpy")
        record = Recorder(__file__, __doc__, given, packages=packages, threads=given.threads, constants=running)
        from polydraft.sampling import _sampler

        choosing = Clock()
        for name in ("choose", "choose_draft"):
            setattr(_sampler.RuleSampler, name, choosing.wrap(getattr(_sampler.RuleSampler, name)))
        prompt = [2, *range(300, 330)]
        session.generate(prompt, max_new_tokens=4)
        for name, settings in SETTINGS.items():
            rows = []
            for _ in range(given.repeats):
                stream = session.stream(prompt, max_new_tokens=given.rounds + 1, ignore_eos=True, **settings)
                next(stream)  # the prompt
                decode.seconds = choosing.seconds = 0.0
                start = time.process_time()
                rounds = sum(1 for _ in stream)
                whole = time.process_time() - start
                rows.append(
                    [value / rounds for value in (whole, choosing.seconds, whole - choosing.seconds - decode.seconds)]
                )
            whole, chosen, rest = (statistics.median(column) for column in zip(*rows, strict=True))
            values = {
                "round_ms": round(1e3 * whole, 2),
                "choosing_ms": round(1e3 * chosen, 3),
                "choosing_share": round(chosen / whole, 5),
                "rest_of_python_ms": round(1e3 * rest, 3),
            }
            record.row({"settings": name}, values)


if __name__ == "__main__":
    main()
