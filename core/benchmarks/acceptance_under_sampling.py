"""Acceptance under sampling: drafts that share the target's noise, against independent rejection sampling.

Both rules of ``acceptance=`` generate from the same prompts at the same temperatures. Rejection sampling (Leviathan et
al. 2023, Algorithm 1) accepts a token as often as any rule can. Exact-match acceptance gives a little of that up for
outputs that are those of plain decoding, seed by seed.

    python core/benchmarks/acceptance_under_sampling.py --backend transformers
    python core/benchmarks/acceptance_under_sampling.py --table     # write the Markdown anew, from the JSON

writes ``results/acceptance_under_sampling.json`` and, from it alone, ``results/acceptance_under_sampling.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "acceptance_under_sampling.json"
RULES = ("exact-match", "rejection")
PAIRS = ("tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama")
TEMPERATURES = (0.5, 0.8, 1.0)


def length_of(counts: list[tuple[int, int]]) -> float:
    """Mean acceptance length, 1 + accepted / rounds, of generations: (accepted, rounds) each."""
    return 1 + sum(accepted for accepted, _ in counts) / sum(rounds for _, rounds in counts)


def interval(counts: list[tuple[int, int]]) -> tuple[float, float]:
    """95 % of the mean acceptance lengths of resampled generations (bootstrap)."""
    generator = random.Random(1)
    lengths = sorted(length_of(generator.choices(counts, k=len(counts))) for _ in range(2000))
    return round(lengths[50], 3), round(lengths[1949], 3)


def measure(session: Any, prompts: list[Any], temperature: float, rule: str, tokens: int) -> dict[str, Any]:
    """One cell of the table."""
    counts, per_position, first = [], [0] * session.running.num_speculative_tokens, 0
    for index, prompt in enumerate(prompts):
        stats = session.generate(
            prompt,
            temperature=temperature,
            seed=index,
            acceptance=rule,
            max_new_tokens=tokens,
            ignore_eos=True,
            speculate="on",
        ).stats
        counts.append((stats.num_accepted_tokens, stats.num_drafts))
        first += stats.num_drafts
        for position, accepted in enumerate(stats.accepted_per_position):
            per_position[position] += accepted
    low, high = interval(counts)
    return {
        "mean_acceptance_length": round(length_of(counts), 4),
        "interval_95": [low, high],
        "rounds": first,
        "acceptance_per_position": [round(accepted / first, 4) for accepted in per_position],
    }


def table(result: dict[str, Any]) -> str:
    """The Markdown of a result."""
    lines = [
        "# Acceptance under sampling",
        "",
        f"Mean acceptance length (1 + accepted / rounds) at k={result['k']}, backend `{result['backend']}` "
        f"({result['engine']}), {result['dtype']}, {result['generations']} generations of {result['tokens']} tokens a "
        "cell; in brackets the 95 % interval of a bootstrap over generations. `exact-match` is the default rule: a "
        "seed gives the tokens of plain decoding. `rejection` is independent rejection sampling (Leviathan et al. "
        "2023, Algorithm 1).",
        "",
        "| pair | temperature | exact-match | rejection | exact-match / rejection |",
        "|---|---|---|---|---|",
    ]
    ratios = []
    for cell in result["cells"]:
        ours, other = (cell[rule] for rule in RULES)
        ratio = ours["mean_acceptance_length"] / other["mean_acceptance_length"]
        ratios.append(ratio)
        shown = [
            f"{part['mean_acceptance_length']:.2f} [{part['interval_95'][0]:.2f}, {part['interval_95'][1]:.2f}]"
            for part in (ours, other)
        ]
        lines.append(f"| {cell['pair']} | {cell['temperature']} | {shown[0]} | {shown[1]} | {ratio:.3f} |")
    lines += [
        "",
        f"Ratios: {min(ratios):.3f} to {max(ratios):.3f}. Commit {result['commit']}; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        + f"; {result['machine']}. Written by `core/benchmarks/acceptance_under_sampling.py` from the JSON beside it.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, unless only the table is asked for, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="transformers")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--generations", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--table", action="store_true", help="only write the Markdown anew")
    options = parser.parse_args()
    if not options.table:
        import polydraft
        from polydraft_builtin_pairs import prompts

        texts = [prompt.text or list(prompt.messages) for prompt in prompts()]
        texts = [texts[index % len(texts)] for index in range(options.generations)]
        cells = []
        for pair in options.pairs.split(","):
            load = {"backend": options.backend, "num_speculative_tokens": options.k, "dtype": "float32"}
            with polydraft.load(f"builtin:{pair}", **load) as session:
                for temperature in TEMPERATURES:
                    cell: dict[str, Any] = {"pair": pair, "temperature": temperature}
                    for rule in RULES:
                        cell[rule] = measure(session, texts, temperature, rule, options.tokens)
                    cells.append(cell)
                    print(json.dumps(cell), flush=True)
                running = session.running
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        result = {
            "k": options.k,
            "backend": options.backend,
            "engine": f"{running.engine} {running.engine_version}",
            "dtype": running.dtype,
            "device": running.device,
            "generations": options.generations,
            "tokens": options.tokens,
            "commit": commit.stdout.strip() or "unknown",
            "versions": {name: version(name) for name in ("polydraft", "polydraft-builtin-pairs", "numpy")},
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cells": cells,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
