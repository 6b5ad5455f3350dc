"""polydraft against Transformers' own ``generate``, plain and speculative: the same pair, prompt, k and process.

The four ways run in turn, ``--repeats`` times; the table holds medians of the times and of the ratios of neighbours.
Outputs are compared too: a speed without the same tokens would say nothing.

    python plugins/transformers/benchmarks/compare_upstream.py --pair tiny-e2b --num-threads 1 --json results.json
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polydraft
import torch
from polydraft_builtin_pairs import prompts
from rich.console import Console
from rich.table import Table

WAYS = ("polydraft", "upstream", "polydraft plain", "upstream plain")


def ways(
    session: Any, prompt: list[int], new_tokens: int, k: int
) -> dict[str, Callable[[], tuple[list[int], float | None]]]:
    """Each way as a function that returns the new tokens and, where it is counted, the mean acceptance length."""
    target = session.engine.target.model
    assistant = session.engine.drafter_model
    assistant.generation_config.num_assistant_tokens = k
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    device = target.device

    def ours(speculate: str) -> Callable[[], tuple[list[int], float | None]]:
        def run() -> tuple[list[int], float | None]:
            result = session.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True, speculate=speculate)
            return list(result.token_ids), result.stats.mean_acceptance_length

        return run

    def upstream(drafter: Any) -> Callable[[], tuple[list[int], float | None]]:
        def run() -> tuple[list[int], float | None]:
            with torch.inference_mode():
                found = target.generate(
                    torch.tensor([prompt], device=device),
                    attention_mask=torch.ones((1, len(prompt)), dtype=torch.long, device=device),
                    assistant_model=drafter,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            return found[0, len(prompt) :].tolist(), None

        return run

    return dict(zip(WAYS, (ours("on"), upstream(assistant), ours("off"), upstream(None)), strict=True))


def measure(functions: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run all in turn: seconds of each run, and the results of the last."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    results: dict[str, Any] = {}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            results[name] = function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds, results


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs="+", default=["tiny-e2b", "tiny-31b", "tiny-26b"])
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    report: list[dict[str, Any]] = []
    table = Table(title=f"{arguments.new_tokens} tokens, k={arguments.k}, {arguments.dtype}, {arguments.device}")
    for column in ("pair", *WAYS, "ours / upstream", "acceptance length", "same tokens"):
        table.add_column(column, justify="left" if column == "pair" else "right")
    prompt_text = prompts()[0].text or ""
    for pair in arguments.pair:
        with polydraft.load(
            f"builtin:{pair}",
            backend="transformers",
            dtype=arguments.dtype,
            device=arguments.device,
            num_speculative_tokens=arguments.k,
            engine_options={"num_threads": arguments.num_threads},
        ) as session:
            prompt = [2, *session.tokenizer.encode(prompt_text)]
            seconds, results = measure(ways(session, prompt, arguments.new_tokens, arguments.k), arguments.repeats)
            ratios = [a / b for a, b in zip(seconds["polydraft"], seconds["upstream"], strict=True)]
            same = all(tokens == results["polydraft"][0] for tokens, _ in results.values())
            row = {
                "pair": pair,
                "median_seconds": {name: round(statistics.median(found), 4) for name, found in seconds.items()},
                "median_ratio": round(statistics.median(ratios), 3),
                "mean_acceptance_length": results["polydraft"][1],
                "same_tokens": same,
                "seconds": {name: [round(value, 4) for value in found] for name, found in seconds.items()},
            }
        report.append(row)
        medians = (f"{row['median_seconds'][name]:.3f} s" for name in WAYS)
        length = f"{row['mean_acceptance_length']:.2f}"
        table.add_row(pair, *medians, f"{row['median_ratio']:.2f}", length, "yes" if same else "NO")
    Console(width=140).print(table)
    if arguments.json:
        about = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine(),
            **{name: value for name, value in vars(arguments).items() if name not in ("json", "pair", "device")},
        }
        arguments.json.write_text(json.dumps({"about": about, "results": report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
