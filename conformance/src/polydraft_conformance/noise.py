"""The numeric noise of an engine, measured on it: by how much logits differ where they should be the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polydraft_conformance.primitives import greedy, logits_of, open_sequence, prefill_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import SteppingEngine

    from polydraft_conformance.primitives import Logits

__all__ = ["EPSILON", "Noise", "difference", "measure_noise"]

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Spacing of floating-point numbers just above 1, by dtype."""


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
    chooser = greedy(engine)
    half = len(token_ids) // 2
    with open_sequence(engine) as sequence:
        sequence.prefill(list(token_ids[:half]), chooser)
        single = [logits_of(sequence.verify([token], chooser, keep_logits=True))[0] for token in token_ids[half:]]
    several: list[Logits] = []
    with open_sequence(engine) as sequence:
        sequence.prefill(list(token_ids[:half]), chooser)
        for start in range(half, len(token_ids), rows):
            step = sequence.verify(list(token_ids[start : start + rows]), chooser, keep_logits=True)
            several.extend(logits_of(step))
    fresh = [prefill_logits(engine, token_ids[: half + index + 1])[-1] for index in range(len(single))]
    return Noise(
        rows=max(map(difference, single, several)),
        prefill=max(map(difference, single, fresh)),
        largest_logit=float(max(np.abs(row[np.isfinite(row)]).max() for row in single)),
    )
