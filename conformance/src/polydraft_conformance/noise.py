"""The numeric noise of an engine, measured on it: by how much logits differ where they should be the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polydraft_conformance.evidence import greedy_settings, plain_result
from polydraft_conformance.primitives import greedy, logits_of, open_sequence, prefill_logits
from polydraft_conformance.prompts import prompt_of_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft import Session
    from polydraft.contract import SteppingEngine

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.primitives import Logits
    from polydraft_conformance.suite import Suite

__all__ = ["EPSILON", "Noise", "context_of", "difference", "epsilon_of", "measure_noise", "noise_of"]

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Spacing of floating-point numbers just above 1, by dtype."""


def epsilon_of(dtype: str) -> float:
    """Spacing just above 1 of ``session.running.dtype``; of names that are none (quantised weights), bfloat16's."""
    return EPSILON.get(dtype.rpartition(".")[2], EPSILON["bfloat16"])


@dataclass(frozen=True, slots=True)
class Noise:
    """Largest differences of one logit between computations that should agree."""

    rows: float
    """Between a token run in a step of its own, and as one row of a step of several."""
    prefill: float
    """Between a token run in a step of its own, and as the last of a prefill."""
    largest_logit: float

    @property
    def most(self) -> float:
        """The larger of the two."""
        return max(self.rows, self.prefill)


def difference(left: Logits, right: Logits) -> float:
    """Largest absolute difference of two rows of logits; entries that are the same infinity do not differ."""
    with np.errstate(invalid="ignore"):
        gaps = np.abs(left.astype(np.float64) - right.astype(np.float64))
    gaps[left == right] = 0.0
    return float(gaps.max())


def measure_noise(engine: SteppingEngine, token_ids: Sequence[int], rows: int) -> Noise:
    """Measure the noise on a short context, well inside any sliding window.

    Args:
        engine: The engine.
        token_ids: A context of at least ``3 * rows`` tokens. Half of it is prefilled.
        rows: Tokens of the larger steps, at most ``max_draft_tokens + 1``.
    """
    sampler = greedy(engine)
    half = len(token_ids) // 2
    with open_sequence(engine) as sequence:
        sequence.prefill(list(token_ids[:half]), sampler)
        single = [logits_of(sequence.verify([token], sampler, keep_logits=True))[0] for token in token_ids[half:]]
    several: list[Logits] = []
    with open_sequence(engine) as sequence:
        sequence.prefill(list(token_ids[:half]), sampler)
        for start in range(half, len(token_ids), rows):
            step = sequence.verify(list(token_ids[start : start + rows]), sampler, keep_logits=True)
            several.extend(logits_of(step))
    fresh = [prefill_logits(engine, token_ids[: half + index + 1])[-1] for index in range(len(single))]
    return Noise(
        rows=max(map(difference, single, several)),
        prefill=max(map(difference, single, fresh)),
        largest_logit=float(max(np.abs(row[np.isfinite(row)]).max() for row in single)),
    )


def context_of(suite: Suite, case: Case, session: Session) -> list[int]:
    """Prompt and greedy output, longer than twice the window: text that the model would write. Made once."""
    key = ("context", case.pair)
    if key not in suite.cache:
        window = case.pair.window
        prompt = prompt_of_length(suite, session, case, max(2, window // 2))
        wanted = 2 * window + 24 - len(prompt)
        plain = plain_result(suite, session, case, prompt, greedy_settings(wanted))
        suite.cache[key] = [*plain.prompt_token_ids, *plain.token_ids]
    context: list[int] = suite.cache[key]
    return context


def noise_of(suite: Suite, case: Case, session: Session, engine: SteppingEngine) -> Noise:
    """The engine's noise on the case's target, measured once."""
    key = ("noise", case.pair)
    if key not in suite.cache:
        rows = min(case.k, engine.max_draft_tokens) + 1
        text = context_of(suite, case, session)
        suite.cache[key] = measure_noise(engine, text[: max(4, min(6 * rows, case.pair.window - rows))], rows)
    noise: Noise = suite.cache[key]
    return noise
