"""The rule: which token is chosen at each position, from logits that processors have already changed.

This module is its definition, in operations that run on a device without waiting for it. ``_host`` finds the same
choices faster for logits in host memory.

Greedy (temperature 0) takes the largest logit, and of equal ones the lowest id. Sampling takes the largest of
``logit / temperature + Gumbel noise`` among the tokens that the filters leave, which is a draw from their softmax
(Gumbel-max; Maddison et al. 2014). Filters come in the order temperature, top_k, top_p, min_p, typical_p. Every
comparison has a total order in float32, (logit, then lower token id), and probabilities for ``top_p`` and ``typical_p``
are summed as integers, so that neither the order of a sum nor a library's sort can change a choice.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from polydraft.sampling.noise import NOISE_MAX, NOISE_MIN, exp_nonpositive, row_keys

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps
    from polydraft.contract.requests import GenerationSettings

__all__ = [
    "REACH",
    "SHARE_ONE",
    "RuleNumbers",
    "as_float32",
    "choose_by_numbers",
    "choose_tokens",
    "numbers_of",
    "scale_of",
    "share_of",
    "surprise",
    "token_weights",
]

REACH = NOISE_MAX - NOISE_MIN + 0.01
"""A token this far below the largest one (in logit / temperature) cannot win whatever the noise; its weight for
``top_p`` is 0."""

SHARE_ONE = 1 << 20
"""1.0 of ``top_p`` or ``typical_p`` in fixed point."""

_WEIGHT_ONE = 1 << 24  # 1.0 of a token's weight in fixed point
_NAT = 1 << 12  # 1.0 of a difference of logits in fixed point: below 2**17 for tokens within REACH
_ID_BITS = 21  # low bits of a sort key, which hold the token id; the bits of the value are above them
_ID_MAX = (1 << _ID_BITS) - 1


def as_float32(value: float) -> float:
    """``value`` rounded to float32, so that libraries that compute scalars in float64 agree."""
    # Through four bytes and back: rounds to nearest, ties to even, without numpy.
    return float(struct.unpack("f", struct.pack("f", value))[0])


def scale_of(settings: GenerationSettings) -> float:
    """1 / temperature, to multiply logits by. Dividing would differ: some libraries multiply by the reciprocal."""
    return as_float32(1.0 / settings.temperature)


def share_of(share: float) -> int:
    """``top_p`` or ``typical_p`` in parts of ``SHARE_ONE``."""
    # Rounded up, so that even the smallest share is at least 1 part and keeps the first token.
    return math.ceil(share * SHARE_ONE)


def token_weights(ops: ArrayOps[Any], values: Any, largest: Any) -> Any:
    """Unnormalised probabilities as integers, so that their sum does not depend on the order of adding.

    Sums are multiplied by 2**20 in int64, so they must stay below 2**43: that is 2**19 equally likely tokens of the
    largest weight, 2**24, and no model's softmax comes near.
    """
    # Whole numbers up to 2**24 are exact in float32, so the cast to int64 rounds nothing.
    return ops.int64(ops.floor(exp_nonpositive(ops, values - largest) * float(_WEIGHT_ONE)))


def surprise(ops: ArrayOps[Any], values: Any, largest: Any) -> Any:
    """By how much less a token is expected than the most likely one: log p(best) - log p, as integers (2**-12 nats).

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666) compares a token's information -log p with its
    mean, the entropy. Both have the term -log p(best), which cancels: the logits need not be normalised.

    Args:
        ops: The operations of the library that ``values`` belong to.
        values: Logits divided by the temperature, float32; ``-inf`` for a token that a filter has dropped.
        largest: The largest of each row.
    """
    # A dropped token has weight 0, so its number does not matter; infinity would not convert to an integer.
    below = ops.where(values >= largest - as_float32(REACH), largest - values, as_float32(REACH))
    return ops.int64(ops.floor(below * float(_NAT)))


def choose_tokens(
    ops: ArrayOps[Any], logits: Any, settings: GenerationSettings, seed: int, stream: int, first_position: int
) -> Any:
    """Choose one token per row.

    Args:
        ops: The operations of the library that ``logits`` belong to.
        logits: Shape (rows, vocab), any float dtype; at most 2**21 columns.
        settings: temperature, top_k, top_p, min_p and typical_p are read.
        seed: Seed of the noise, 0 to 2**63 - 1.
        stream: Number of the noise stream.
        first_position: Absolute position of the token that row 0 chooses; row i chooses for ``first_position + i``.

    Returns:
        Int64 array of shape (rows,), on the logits' device.
    """
    # In the logits' own dtype: casting to float32 would not change their order.
    if settings.temperature == 0.0:
        return ops.argmax(logits)
    # One 64-bit key per row, in two 32-bit halves; ``column`` makes int64 arrays of shape (rows, 1) of them.
    low, high = row_keys(seed, stream, range(first_position, first_position + logits.shape[0]))
    return choose_by_numbers(ops, logits, numbers_of(settings), (ops.column(low, logits), ops.column(high, logits)))


class RuleNumbers(NamedTuple):
    """What the rule computes with, of settings with a temperature above 0.

    All but ``top_k`` may also be arrays of shape () on the logits' device: then what runs there does not depend on
    them, and a step that an engine has recorded serves other settings, too.
    """

    scale: Any
    """float32: 1 / temperature."""
    top_k: int
    """0: off."""
    top_p: Any
    """int64: the share in parts of ``SHARE_ONE``; None: off."""
    min_p: Any
    """float32: its logarithm; None: off."""
    typical_p: Any
    """As ``top_p``."""


def numbers_of(settings: GenerationSettings) -> RuleNumbers:
    """The numbers of settings whose temperature is above 0."""
    return RuleNumbers(
        scale_of(settings),
        settings.top_k,
        share_of(settings.top_p) if settings.top_p < 1.0 else None,
        as_float32(math.log(settings.min_p)) if settings.min_p > 0.0 else None,
        share_of(settings.typical_p) if settings.typical_p < 1.0 else None,
    )


def choose_by_numbers(ops: ArrayOps[Any], logits: Any, numbers: RuleNumbers, keys: tuple[Any, Any]) -> Any:
    """``choose_tokens`` at a temperature above 0, in operations on a device alone.

    Args:
        ops: As there.
        logits: As there.
        numbers: Of the settings.
        keys: The noise's, of each row: the two int64 arrays (rows, 1) of ``row_keys``.
    """
    scaled = ops.float32(logits) * numbers.scale
    # Without these filters nothing is sorted: noise for the whole vocabulary, (rows, vocab), is cheaper.
    if not numbers.top_k and numbers.top_p is None and numbers.typical_p is None:
        if numbers.min_p is not None:
            scaled = _above(ops, scaled, ops.row_max(scaled), numbers)
        return ops.argmax(scaled + ops.gumbel(ops.columns(scaled), *keys))
    largest = ops.row_max(scaled)
    # From here on (rows, n): only tokens that noise could still make the winner. The others have weight 0 for top_p.
    values, token_ids = ops.candidates(scaled, largest - as_float32(REACH))
    if numbers.top_k or numbers.top_p is not None:
        values, token_ids = _filter_sorted(ops, values, token_ids, largest, numbers)
    if numbers.min_p is not None:
        values = _above(ops, values, largest, numbers)
    if numbers.typical_p is not None:
        values, token_ids = _typical(ops, values, token_ids, largest, numbers)
    score = values + ops.gumbel(token_ids, *keys)
    winners = score == ops.row_max(score)
    # The lowest id of equal scores. ``token_ids * 0 + _ID_MAX``: the largest id, as an array of the same library.
    return ops.first_column(ops.row_min(ops.where(winners, token_ids, token_ids * 0 + _ID_MAX)))


def _above(ops: ArrayOps[Any], values: Any, largest: Any, numbers: RuleNumbers) -> Any:
    """``-inf`` for the values that are too small for min_p."""
    # p >= min_p * p_max, in logarithms: no probability is computed.
    return ops.where(values >= largest + numbers.min_p, values, -math.inf)


def _filter_sorted(
    ops: ArrayOps[Any], values: Any, token_ids: Any, largest: Any, numbers: RuleNumbers
) -> tuple[Any, Any]:
    """Sort by (value, lower id first) and keep what top_k and top_p leave; the rest becomes ``-inf``."""
    bits = ops.bits(values + 0.0)  # -0.0 becomes 0.0, which would otherwise sort below it
    # As integers, negative floats' bits sort the wrong way round: reverse them.
    ordered = ops.where(bits < 0, -(1 << 31) - 1 - bits, bits)
    # 32 bits of value above 21 bits of id make 53. All keys differ, so an unstable sort has only one result.
    keys = ordered * (1 << _ID_BITS) + (_ID_MAX - token_ids)
    if 0 < numbers.top_k < values.shape[-1]:
        _, order = ops.best(keys, numbers.top_k)
    else:
        order = ops.argsort_descending(keys)
    values, token_ids = ops.take(values, order), ops.take(token_ids, order)
    if numbers.top_p is not None:
        weights = token_weights(ops, values, largest)
        # Weight before each token, its own excluded: the token that crosses top_p is kept.
        before = ops.row_cumsum(weights) - weights
        kept = before * SHARE_ONE < ops.row_sum(weights) * numbers.top_p  # before / total < top_p
        values = ops.where(kept, values, -math.inf)
    return values, token_ids


def _typical(ops: ArrayOps[Any], values: Any, token_ids: Any, largest: Any, numbers: RuleNumbers) -> tuple[Any, Any]:
    """Sort by (distance from the mean surprise, lower id first) and keep what typical_p leaves; the rest: ``-inf``."""
    weights, own = token_weights(ops, values, largest), surprise(ops, values, largest)
    total = ops.row_sum(weights)
    # Of a row that is not sound it may be 0 or less, and a device must not divide by 0; what is chosen is not used.
    total = ops.where(total > 0, total, 1)
    # Weights sum to less than 2**43 and a surprise is below 2**18, so the sum of products fits int64.
    distance = own - ops.row_sum(weights * own) // total
    distance = ops.where(distance < 0, -distance, distance)
    order = ops.argsort_descending(-distance * (1 << _ID_BITS) + (_ID_MAX - token_ids))
    values, token_ids, weights = ops.take(values, order), ops.take(token_ids, order), ops.take(weights, order)
    # As for top_p: the token that crosses typical_p is kept.
    before = ops.row_cumsum(weights) - weights
    return ops.where(before * SHARE_ONE < total * numbers.typical_p, values, -math.inf), token_ids
