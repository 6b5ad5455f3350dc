"""Numeric noise: by how much logits differ that should be equal, and how much of that rounding explains."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polydraft.errors import NonFiniteLogitsError
from polydraft.sampling._soundness import largest_logits
from polydraft.sampling.numpy_ops import array_ops_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract.results import TokenLogprobs
    from polydraft.contract.stepping import SteppingEngine

__all__ = ["EPSILON", "GreedySampler", "Logits", "Noise", "difference", "epsilon_of", "measure_noise", "reroutes"]

Logits = npt.NDArray[np.float32]

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "tf32": 2.0**-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Spacing of floating-point numbers just above 1, by precision."""

_ROUNDINGS = {"float64": 64.0, "float32": 64.0}
_HALF_ROUNDINGS = 16.0
"""Tolerance in roundings of the largest logit. Smaller in half precision, whose sums accumulate in float32."""
_EXPERT_ROUNDINGS = 40.0
"""The same in bfloat16's roundings, for a mixture of experts in any precision below float32: a token that rounding
sends to other experts moves logits far. tiny-26b in bfloat16 beside float32, on a CPU: 9 of 10 rows by up to 1.3, one
of 436 by 24."""
_GROWTH = 16.0
"""Tolerance as a multiple of the noise on another, short context: noise grows with the length of the context."""


def epsilon_of(precision: str) -> float:
    """Spacing just above 1 of ``session.running.precision``; names of quantised weights count as bfloat16."""
    return EPSILON.get(precision.rpartition(".")[2], EPSILON["bfloat16"])


def reroutes(precision: str) -> bool:
    """Whether rounding in ``session.running.precision`` sends tokens to other experts often enough to be seen."""
    return epsilon_of(precision) > EPSILON["float32"]


@dataclass(frozen=True, slots=True)
class Noise:
    """Largest differences of one logit between computations that should agree."""

    rows: float
    """Between a token run in a single-token step, and as one row of a step of several."""
    prefill: float
    """Between a token run in a single-token step, and as the last of a prefill."""
    largest_logit: float

    @property
    def most(self) -> float:
        """The larger of the two."""
        return max(self.rows, self.prefill)

    def rounding(self, precision: str, *, experts: bool = False) -> float:
        """How far rounding in ``session.running.precision`` moves a logit on contexts such as these, at most.

        ``experts``: whether the target is a mixture of experts.
        """
        roundings = _ROUNDINGS.get(precision.rpartition(".")[2], _HALF_ROUNDINGS)
        return max(roundings * epsilon_of(precision) * self.largest_logit, self._rerouted(precision, experts=experts))

    def _rerouted(self, precision: str, *, experts: bool) -> float:
        """How far a token that rounding sends to other experts moves a logit; 0 where it hardly ever does."""
        if not (experts and reroutes(precision)):
            return 0.0
        return _EXPERT_ROUNDINGS * EPSILON["bfloat16"] * self.largest_logit

    def explains(self, precision: str, *, experts: bool = False) -> float:
        """How far rounding may move a logit on any other context; a larger difference is a defect.

        Two limits, and the smaller one holds. By the precision: some roundings of the largest logit, or, for engines
        that compute below what they say, a multiple of what a prefill differs; that one is capped at bfloat16's
        roundings, as a prefill can be wrong, too. By this engine's own noise: a multiple of it. What tokens that
        rounding sends to other experts move is not limited by either.

        Args:
            precision: Of ``session.running``.
            experts: Whether the target is a mixture of experts.
        """
        below_dtype = _GROWTH * min(self.prefill, EPSILON["bfloat16"] * self.largest_logit)
        # At least one rounding: an engine whose ways agree bit by bit here may differ by one elsewhere.
        own = _GROWTH * max(self.most, epsilon_of(precision) * self.largest_logit)
        alike = min(max(self.rounding(precision), below_dtype), own)
        return max(alike, self._rerouted(precision, experts=experts))


class GreedySampler:
    """A ``polydraft.contract.Sampler`` for temperature 0, independent of the core's rule. Tests use it as well.

    It refuses every row of the target's that is not finite, as no comparison of such rows means anything.

    Args:
        engine: The engine whose arrays it reads.
    """

    needs_prefix = False
    rows: Logits
    """Logits of the last step, shape (rows, vocab), as the engine gave them. The engine may reuse their memory."""

    def __init__(self, engine: SteppingEngine) -> None:
        self._ops = array_ops_of(engine)
        self._dtype = engine.running.dtype

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """The largest logit of each row.

        Raises:
            NonFiniteLogitsError: A row has NaN or +inf, or no finite number.
        """
        self.rows = self._ops.numpy(logits)
        for position, largest in enumerate(self.rows.max(axis=-1).tolist(), first_position):
            if not math.isfinite(largest):
                raise NonFiniteLogitsError.at(largest, position, self._dtype)
        return [int(token) for token in np.argmax(self.rows, axis=-1)], None

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """The largest logit, as the engine's own array of shape (1,). Errors as for ``choose``."""
        value = self._ops.tolist(largest_logits(self._ops, logits))[0]
        if not math.isfinite(value):
            raise NonFiniteLogitsError.at(value, position, self._dtype, drafter=True)
        return self._ops.argmax(logits)


def difference(left: Logits, right: Logits) -> float:
    """Largest absolute difference of two rows of logits; entries that are the same infinity do not differ.

    Infinite where a row holds NaN: a comparison with NaN would pass as false.
    """
    with np.errstate(invalid="ignore"):
        gaps = np.abs(left.astype(np.float64) - right.astype(np.float64))
    # inf - inf is NaN, and means no difference.
    gaps[left == right] = 0.0
    largest = float(gaps.max())
    return math.inf if math.isnan(largest) else largest


def measure_noise(engine: SteppingEngine, token_ids: Sequence[int], rows: int) -> Noise:
    """Measure the noise on one context: its second half is run one token at a time, in larger steps, and by prefills.

    Args:
        engine: The engine; new sequences are opened, one at a time.
        token_ids: At least two tokens, better ``3 * rows``, and well inside any sliding window: then the KV cache has
            no part in what is measured.
        rows: Tokens of the larger steps, at most ``engine.max_draft_tokens + 1``.
    """
    half = len(token_ids) // 2

    def steps(size: int) -> list[Logits]:
        found: list[Logits] = []
        sampler = GreedySampler(engine)
        with closing(engine.open_sequence()) as sequence:
            sequence.prefill(token_ids[:half], sampler)
            for start in range(half, len(token_ids), size):
                sequence.verify(token_ids[start : start + size], sampler)
                found.extend(sampler.rows.copy())
        return found

    def prefilled(length: int) -> Logits:
        sampler = GreedySampler(engine)
        with closing(engine.open_sequence()) as sequence:
            sequence.prefill(token_ids[:length], sampler)
            row: Logits = sampler.rows[-1].copy()
        return row

    single, several = steps(1), steps(rows)
    # Row i of ``single`` follows token half + i, so its prefill has half + i + 1 tokens.
    fresh = [prefilled(half + index + 1) for index in range(len(single))]
    return Noise(
        rows=max(map(difference, single, several)),
        prefill=max(map(difference, single, fresh)),
        # Finite ones only: a model may give -inf for ids that it never chooses.
        largest_logit=float(max(np.abs(row[np.isfinite(row)]).max(initial=0.0) for row in single)),
    )
