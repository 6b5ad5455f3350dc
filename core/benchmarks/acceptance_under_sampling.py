"""Acceptance under sampling: drafts that share the target's noise, compared with independent rejection sampling.

Rejection sampling (Leviathan et al. 2023, Algorithm 1) accepts a token as often as any rule can. Exact-match
acceptance gives a little of that up for outputs that are those of plain decoding, seed by seed. How much, is measured
in two ways, from the same places all over texts that plain decoding wrote:

- counted: both rules run single rounds with several seeds. This is what sessions do, and its noise is large.
- expected: given the target's and the drafter's probabilities p and q at a position, the chance of acceptance is known:
  ``sum min(p, q)`` for rejection; ``sum_x 1 / sum_j max(p_j / p_x, q_j / q_x)`` for two choices with the same Gumbel
  noise. Along each drafted path these chances make the expected length of either rule, without drawing lots. The path
  is the same for both, so that their ratio is known to a percent.

    python core/benchmarks/acceptance_under_sampling.py --backend transformers --save [--keep]

With ``--keep``, what the file has already is not measured again.
"""

from __future__ import annotations

import argparse
import random
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
from benchmarks import Recorder, parser

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


def values_of(texts: list[Counts]) -> dict[str, dict[str, Any]]:
    """Mean acceptance lengths; exact-match's over rejection's, with 95% intervals from a bootstrap over texts."""

    def length(chosen: list[Counts], name: str) -> float:
        rounds = [count for counts in chosen for count in counts[name]]
        return 1 + sum(rounds) / len(rounds)

    values: dict[str, dict[str, Any]] = {}
    for rule in RULES:
        rounds = [int(count) for counts in texts for count in counts[rule]]
        shares = [sum(count > place for count in rounds) / len(rounds) for place in range(max(rounds, default=0))]
        values[rule] = {
            "rounds": len(rounds),
            "mean_acceptance_length": round(length(texts, rule), 4),
            "acceptance_per_position": [round(share, 4) for share in shares],
            "expected_mean_acceptance_length": round(length(texts, f"expected {rule}"), 4),
        }
    for prefix, key in (("", "counted"), ("expected ", "expected")):
        generator = random.Random(1)
        samples = [texts, *(generator.choices(texts, k=len(texts)) for _ in range(1000))]
        ratios = [length(chosen, prefix + RULES[0]) / length(chosen, prefix + RULES[1]) for chosen in samples]
        ordered = sorted(ratios[1:])
        values[RULES[0]][f"{key}_ratio"] = round(ratios[0], 4)
        values[RULES[0]][f"{key}_ratio_interval"] = [round(ordered[25], 4), round(ordered[974], 4)]
    return values


def main() -> None:
    """Measure pair by pair."""
    import polydraft
    from polydraft_builtin_pairs import prompts

    arguments = parser(__doc__)
    arguments.add_argument("--backend", default="transformers")
    arguments.add_argument("--pairs", nargs="+", default=list(PAIRS))
    arguments.add_argument("-k", type=int, default=4)
    arguments.add_argument("--texts", type=int, default=26)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--every", type=int, default=4, help="places in a text that rounds start from")
    arguments.add_argument("--seeds", type=int, default=4, help="rounds of each rule from a place")
    options = arguments.parse_args()
    record: Recorder | None = None
    texts = [prompt.text or list(prompt.messages) for prompt in prompts()][: options.texts]
    load = {"backend": options.backend, "num_speculative_tokens": options.k, "dtype": "float32"}
    for pair in options.pairs:
        with polydraft.load(f"builtin:{pair}", **load) as session:
            running = session.running
            record = record or Recorder(
                __file__,
                __doc__,
                options,
                packages=("polydraft-builtin-pairs", "numpy"),
                constants={"dtype": running.dtype, "device": running.device},
                versions={running.engine: running.engine_version},
            )
            for temperature in (each for each in TEMPERATURES if not record.has(pair=pair, temperature=each)):
                counts = [measure(session, text, temperature, options, seed) for seed, text in enumerate(texts)]
                for rule, values in values_of(counts).items():
                    record.row({"pair": pair, "temperature": temperature, "rule": rule}, values)


if __name__ == "__main__":
    main()
