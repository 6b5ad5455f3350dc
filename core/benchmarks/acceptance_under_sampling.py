"""Acceptance under sampling: drafts that share the target's noise, against independent rejection sampling.

Rejection sampling (Leviathan et al. 2023, Algorithm 1) accepts a token as often as any rule can. Exact-match
acceptance gives a little of that up for outputs that are those of plain decoding, seed by seed. How much, is measured
in pairs: plain decoding writes texts; from places all over them, both rules run single rounds with several seeds. So
both meet the same prefixes, and the difference between texts, far larger than the one between rules, drops out.

    python core/benchmarks/acceptance_under_sampling.py --backend transformers
    python core/benchmarks/acceptance_under_sampling.py --table     # write the Markdown anew, from the JSON

writes ``results/acceptance_under_sampling.json``, after each pair, and from it alone the Markdown beside it. Pairs that
the JSON has already are kept: delete it to begin anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "acceptance_under_sampling.json"
RULES = ("exact-match", "rejection")
PAIRS = ("tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama")
TEMPERATURES = (0.5, 0.8, 1.0)

Counts = dict[str, list[int]]
"""Rule -> accepted drafts of each round; the rules' rounds stand side by side."""


def measure(session: Any, prompt: Any, temperature: float, options: argparse.Namespace, first_seed: int) -> Counts:
    """Rounds of both rules from places of one text."""
    from polydraft.contract import GenerationSettings, TokenRequest
    from polydraft.sampling.rejection import make_chooser

    text = session.generate(
        prompt, temperature=temperature, seed=first_seed, max_new_tokens=options.tokens, speculate="off"
    )
    engine, output = session.engine, text.token_ids

    def chooser_of(rule: Any, seed: int) -> Any:
        request = TokenRequest(
            prompt_token_ids=text.prompt_token_ids,
            settings=GenerationSettings(temperature=temperature, acceptance=rule),
            seed=seed,
            speculate=True,
            num_speculative_tokens=options.k,
            eos_token_ids=frozenset(),
            max_total_tokens=session.running.context_length,
        )
        return make_chooser(engine.array_ops, request)

    counts: Counts = {rule: [] for rule in RULES}
    plain = chooser_of("exact-match", 0)
    with closing(engine.open_sequence()) as sequence:
        sequence.prefill(text.prompt_token_ids, plain)
        for index in range(len(output) - 1):
            if index % options.every == 0 and index:
                for seed in range(options.seeds):
                    for rule in RULES:
                        chooser = chooser_of(rule, first_seed * 1000 + seed + 1)
                        before = sequence.length
                        sequence.rollback(before - 1)  # drafters want the row before the newest token to be fresh
                        sequence.verify([output[index - 1]], plain)
                        drafts = sequence.propose(output[index], options.k, chooser).token_ids
                        chosen = sequence.verify([output[index], *drafts], chooser).token_ids
                        sequence.rollback(before)
                        right = [draft == token for draft, token in zip(drafts, chosen, strict=False)]
                        counts[rule].append((*right, False).index(False))
            sequence.verify([output[index]], plain)
    return counts


def cell_of(texts: list[Counts]) -> dict[str, Any]:
    """Mean acceptance lengths, and their ratio with its 95 % interval (bootstrap over texts)."""

    def length(chosen: list[Counts], rule: str) -> float:
        rounds = [count for counts in chosen for count in counts[rule]]
        return 1 + sum(rounds) / len(rounds)

    def ratio(chosen: list[Counts]) -> float:
        return length(chosen, RULES[0]) / length(chosen, RULES[1])

    generator = random.Random(1)
    ratios = sorted(ratio(generator.choices(texts, k=len(texts))) for _ in range(1000))
    cell: dict[str, Any] = {"rounds": sum(len(counts[RULES[0]]) for counts in texts)}
    for rule in RULES:
        rounds = [count for counts in texts for count in counts[rule]]
        shares = [sum(count > place for count in rounds) / len(rounds) for place in range(max(rounds, default=0))]
        cell[rule] = {
            "mean_acceptance_length": round(length(texts, rule), 4),
            "acceptance_per_position": [round(share, 4) for share in shares],
        }
    return {**cell, "ratio": round(ratio(texts), 4), "interval_95": [round(ratios[25], 4), round(ratios[974], 4)]}


def table(result: dict[str, Any]) -> str:
    """The Markdown of a result."""
    lines = [
        "# Acceptance under sampling",
        "",
        f"Mean acceptance length (1 + accepted / rounds) at k={result['k']}, backend `{result['backend']}` "
        f"({result['engine']}), {result['dtype']}. `exact-match` is the default rule: a seed gives the tokens of plain "
        "decoding. `rejection` is independent rejection sampling (Leviathan et al. 2023, Algorithm 1). Both rules run "
        f"from the same prefixes: every {result['every']}th place of {result['texts']} texts of up to "
        f"{result['tokens']} tokens, {result['seeds']} seeds each. In brackets the 95 % interval of a bootstrap over "
        "texts.",
        "",
        "| pair | temperature | rounds | exact-match | rejection | exact-match / rejection |",
        "|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        ours, other = (f"{cell[rule]['mean_acceptance_length']:.2f}" for rule in RULES)
        low, high = cell["interval_95"]
        lines.append(
            f"| {cell['pair']} | {cell['temperature']} | {cell['rounds']} | {ours} | {other} "
            f"| {cell['ratio']:.3f} [{low:.3f}, {high:.3f}] |"
        )
    ratios = [cell["ratio"] for cell in result["cells"]]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += [
        "",
        f"Ratios: {min(ratios):.3f} to {max(ratios):.3f}. Commit {result['commit']}; {versions}; {result['machine']}. "
        "Written by `core/benchmarks/acceptance_under_sampling.py` from the JSON beside it.",
        "",
    ]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure the pairs that are missing."""
    import polydraft
    from polydraft_builtin_pairs import prompts

    texts = [prompt.text or list(prompt.messages) for prompt in prompts()][: options.texts]
    done = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []
    for pair in options.pairs.split(","):
        if any(cell["pair"] == pair for cell in done):
            continue
        load = {"backend": options.backend, "num_speculative_tokens": options.k, "dtype": "float32"}
        with polydraft.load(f"builtin:{pair}", **load) as session:
            for temperature in TEMPERATURES:
                counts = [measure(session, text, temperature, options, seed) for seed, text in enumerate(texts)]
                done.append({"pair": pair, "temperature": temperature, **cell_of(counts)})
                print(json.dumps(done[-1]), flush=True)
            running = session.running
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        result = {
            "k": options.k,
            "backend": options.backend,
            "engine": f"{running.engine} {running.engine_version}",
            "dtype": running.dtype,
            "device": running.device,
            "texts": len(texts),
            "tokens": options.tokens,
            "every": options.every,
            "seeds": options.seeds,
            "commit": commit.stdout.strip() or "unknown",
            "versions": {name: version(name) for name in ("polydraft", "polydraft-builtin-pairs", "numpy")},
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cells": done,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, unless only the table is asked for, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="transformers")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--texts", type=int, default=26)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--every", type=int, default=4, help="places in a text that rounds start from")
    parser.add_argument("--seeds", type=int, default=4, help="rounds of each rule from a place")
    parser.add_argument("--table", action="store_true", help="only write the Markdown anew")
    options = parser.parse_args()
    if not options.table:
        run(options)
    RESULTS.with_suffix(".md").write_text(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
