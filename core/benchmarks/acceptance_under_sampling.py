"""Acceptance under sampling: drafts that share the target's noise, against independent rejection sampling.

Rejection sampling (Leviathan et al. 2023, Algorithm 1) accepts a token as often as any rule can. Exact-match
acceptance gives a little of that up for outputs that are those of plain decoding, seed by seed. How much, is measured
in two ways, from the same places all over texts that plain decoding wrote:

- counted: both rules run single rounds with several seeds. This is what sessions do, and its noise is large.
- expected: given the target's and the drafter's probabilities p and q at a position, the chance of acceptance is known:
  ``sum min(p, q)`` for rejection; ``sum_x 1 / sum_j max(p_j / p_x, q_j / q_x)`` for two choices with the same Gumbel
  noise. Along each drafted path these chances make the expected length of either rule, without drawing lots. The path
  is the same for both, so that their ratio is known to a percent.

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

import numpy as np

RESULTS = Path(__file__).parent / "results" / "acceptance_under_sampling.json"
RULES = ("exact-match", "rejection")
PAIRS = ("tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama")
TEMPERATURES = (0.5, 0.8, 1.0)

Counts = dict[str, list[float]]
"""Name -> accepted drafts of each round; the same round of all names starts from the same place."""


def probabilities(logits: Any, temperature: float) -> Any:
    """Softmax, float64; shape (rows, vocab)."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def expected(target: Any, drafter: Any, drafts: list[int]) -> dict[str, float]:
    """Each rule's expected number of accepted drafts, estimated along one path that was drawn from the drafter.

    A draft x that was drawn from q is accepted with the chance ``min(1, p_x / q_x)``, or, as the winner of the same
    noise in both, with ``1 / sum_j max(p_j q_x / p_x, q_j)``. At each position the chance of any draft counts, weighed
    by the chance that the path got there.

    Args:
        target: p, shape (k + 1, vocab), all above 0.
        drafter: q, shape (k, vocab), all above 0.
        drafts: The path, k tokens.
    """
    reached, sums = dict.fromkeys(RULES, 1.0), dict.fromkeys(RULES, 0.0)
    for p, q, draft in zip(target, drafter, drafts, strict=False):
        ratio = p / q
        order = np.argsort(ratio)
        below, above = np.cumsum(q[order]), np.cumsum(p[order][::-1])[::-1]
        both_win = np.empty_like(p)  # sum_j max(p_j / p_x, q_j / q_x): up to x in this order q decides, then p
        both_win[order] = 1 / (below / q[order] + np.append(above[1:], 0.0) / p[order])
        sums["exact-match"] += reached["exact-match"] * float(both_win.sum())
        sums["rejection"] += reached["rejection"] * float(np.minimum(p, q).sum())
        reached["exact-match"] *= float(both_win[draft] / q[draft])
        reached["rejection"] *= min(1.0, float(ratio[draft]))
    return sums


def measure(session: Any, prompt: Any, temperature: float, options: argparse.Namespace, first_seed: int) -> Counts:
    """Rounds of both rules from places of one text."""
    from polydraft.contract import GenerationSettings, TokenRequest
    from polydraft.sampling._rejection import make_sampler

    text = session.generate(
        prompt, temperature=temperature, seed=first_seed, max_new_tokens=options.tokens, speculate="off"
    )
    engine, output = session.engine, text.token_ids

    def sampler_of(rule: Any, seed: int) -> Any:
        request = TokenRequest(
            prompt_token_ids=text.prompt_token_ids,
            settings=GenerationSettings(temperature=temperature, acceptance=rule),
            seed=seed,
            speculate=True,
            num_speculative_tokens=options.k,
            eos_token_ids=frozenset(),
            max_total_tokens=session.running.context_length,
        )
        return make_sampler(engine.array_ops, request)

    counts: Counts = {name: [] for rule in RULES for name in (rule, f"expected {rule}")}
    plain = sampler_of("exact-match", 0)
    with closing(engine.open_sequence()) as sequence:
        sequence.prefill(text.prompt_token_ids, plain)
        for index in range(len(output) - 1):
            if index % options.every == 0 and index:
                for seed in range(options.seeds):
                    for rule in RULES:
                        sampler = sampler_of(rule, first_seed * 1000 + seed + 1)
                        before = sequence.length
                        sequence.rollback(before - 1)  # drafters want the row before the newest token to be fresh
                        sequence.verify([output[index - 1]], plain)
                        proposal = sequence.propose(output[index], options.k, sampler, keep_logits=True)
                        drafts = proposal.token_ids
                        step = sequence.verify([output[index], *drafts], sampler, keep_logits=True)
                        sequence.rollback(before)
                        right = [draft == token for draft, token in zip(drafts, step.token_ids, strict=False)]
                        counts[rule].append((*right, False).index(False))
                        if rule == "exact-match":
                            logits = (handle.numpy() for handle in (step.logits, proposal.logits))
                            chances = expected(*(probabilities(array, temperature) for array in logits), drafts)
                            for name, value in chances.items():
                                counts[f"expected {name}"].append(value)
            sequence.verify([output[index]], plain)
    return counts


def cell_of(texts: list[Counts]) -> dict[str, Any]:
    """Mean acceptance lengths, and the rules' ratios with 95 % intervals (bootstrap over texts)."""

    def length(chosen: list[Counts], name: str) -> float:
        rounds = [count for counts in chosen for count in counts[name]]
        return 1 + sum(rounds) / len(rounds)

    cell: dict[str, Any] = {"rounds": sum(len(counts[RULES[0]]) for counts in texts)}
    for rule in RULES:
        rounds = [int(count) for counts in texts for count in counts[rule]]
        shares = [sum(count > place for count in rounds) / len(rounds) for place in range(max(rounds, default=0))]
        cell[rule] = {
            "mean_acceptance_length": round(length(texts, rule), 4),
            "acceptance_per_position": [round(share, 4) for share in shares],
            "expected_mean_acceptance_length": round(length(texts, f"expected {rule}"), 4),
        }
    for prefix, key in (("", "counted"), ("expected ", "expected")):
        generator = random.Random(1)
        samples = [texts, *(generator.choices(texts, k=len(texts)) for _ in range(1000))]
        ratios = [length(chosen, prefix + RULES[0]) / length(chosen, prefix + RULES[1]) for chosen in samples]
        ordered = sorted(ratios[1:])
        cell[f"{key}_ratio"] = [round(ratio, 4) for ratio in (ratios[0], ordered[25], ordered[974])]
    return cell


def table(result: dict[str, Any]) -> str:
    """The Markdown of a result."""
    lines = [
        "# Acceptance under sampling",
        "",
        f"Mean acceptance length (1 + accepted / rounds) at k={result['k']}, backend `{result['backend']}` "
        f"({result['engine']}), {result['dtype']}. `exact-match` is the default rule: a seed gives the tokens of plain "
        "decoding. `rejection` is independent rejection sampling (Leviathan et al. 2023, Algorithm 1). Both rules run "
        f"from the same prefixes: every {result['every']}th place of {result['texts']} texts of up to "
        f"{result['tokens']} tokens, {result['seeds']} seeds each. *Expected* is calculated from the target's and the "
        "drafter's probabilities along the drafted paths, *counted* is what single rounds accepted: the same quantity "
        "with far more noise. In brackets the 95 % interval of a bootstrap over texts.",
        "",
        "| pair | temperature | rounds | exact-match, expected | rejection, expected | ratio, expected "
        "| exact-match, counted | rejection, counted | ratio, counted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        fields = [cell["pair"], cell["temperature"], cell["rounds"]]
        for key, name in (("expected", "expected_mean_acceptance_length"), ("counted", "mean_acceptance_length")):
            ratio, low, high = cell[f"{key}_ratio"]
            fields += [f"{cell[rule][name]:.2f}" for rule in RULES] + [f"{ratio:.3f} [{low:.3f}, {high:.3f}]"]
        lines.append(f"| {' | '.join(map(str, fields))} |")
    ratios = [cell["expected_ratio"][0] for cell in result["cells"]]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += [
        "",
        f"Expected ratios: {min(ratios):.3f} to {max(ratios):.3f}. Commit {result['commit']}; {versions}; "
        f"{result['machine']}. Written by `core/benchmarks/acceptance_under_sampling.py` from the JSON beside it.",
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
