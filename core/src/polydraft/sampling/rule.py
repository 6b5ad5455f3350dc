"""The rule: which token is chosen at each position, from logits that processors have already changed.

Greedy (temperature 0) takes the largest logit, and of equal ones the lowest id. Sampling takes the largest of
``logit / temperature + Gumbel noise`` among the tokens that the filters leave, which is a draw from their softmax
(Gumbel-max; Maddison et al. 2014). Filters come in the order temperature, top_k, top_p, min_p. Every comparison has a
total order in float32, (logit, then lower token id), and probabilities for ``top_p`` are summed as integers, so that
neither the order of a sum nor a library's sort can change a choice.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from polydraft.sampling.noise import NOISE_MAX, NOISE_MIN, exp_nonpositive, gumbel, gumbel_of_bits, row_keys

if TYPE_CHECKING:
    from polydraft.contract.requests import GenerationSettings
    from polydraft.sampling.ops import ArrayOps

__all__ = ["choose_tokens", "kept_tokens"]

# A token further below the largest one cannot win, whatever the noise; and its integer weight below is 0.
_REACH = NOISE_MAX - NOISE_MIN + 0.01
_WEIGHT_ONE = 1 << 24
_SHARE_ONE = 1 << 20
_ID_BITS = 21
_ID_MAX = (1 << _ID_BITS) - 1
# How candidates are sought on a host: these change how long it takes, and no choice.
_SAMPLE_STRIDE = 64
_BLOCK = 256
_DIRECT_WIDTH = 512
_NUCLEUS_STEPS = (1.0, 2.0, 4.0, 8.0)


def _as_float32(value: float) -> float:
    """``value`` rounded to float32, so that libraries that compute scalars in float64 agree."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def choose_tokens(
    ops: ArrayOps[Any], logits: Any, settings: GenerationSettings, seed: int, stream: int, first_position: int
) -> Any:
    """Choose one token a row.

    Args:
        ops: The operations of the library that ``logits`` belong to.
        logits: Shape (rows, vocab), any float dtype; at most 2**21 columns.
        settings: temperature, top_k, top_p and min_p are read.
        seed: Seed of the noise, 0 to 2**63 - 1.
        stream: Number of the noise stream.
        first_position: Absolute position of the token that row 0 chooses; row i chooses for ``first_position + i``.

    Returns:
        Int64 array of shape (rows,), on the logits' device.
    """
    if settings.temperature == 0.0:
        return ops.argmax(logits)
    low, high = row_keys(seed, stream, range(first_position, first_position + logits.shape[0]))
    keys = ops.column(low, logits), ops.column(high, logits)
    if settings.top_k or settings.top_p < 1.0 or settings.min_p > 0.0 or not ops.on_host(logits):
        values, token_ids = kept_tokens(ops, logits, settings)
        return _winner(ops, values + gumbel(ops, token_ids, keys), token_ids)
    return _race(ops, _scaled(ops, logits, settings), keys)


def kept_tokens(ops: ArrayOps[Any], logits: Any, settings: GenerationSettings) -> tuple[Any, Any]:
    """The tokens that temperature and filters leave: those that can be chosen, with the logits to sample from.

    Args:
        ops: The operations of the library that ``logits`` belong to.
        logits: Shape (rows, vocab), any float dtype.
        settings: temperature (above 0), top_k, top_p and min_p are read.

    Returns:
        Float32 logits divided by the temperature, ``-inf`` for what is dropped or padding, and int64 token ids; both
        of shape (rows, n).
    """
    scaled = _scaled(ops, logits, settings)
    largest = ops.row_max(scaled)
    floor = largest - _as_float32(_REACH)
    on_host = ops.on_host(scaled)
    blocks = scaled.shape[-1] // _BLOCK
    if on_host and 0 < settings.top_k <= blocks // 2:
        # So many blocks have a maximum of at least ``bound``: the top_k tokens are not below it.
        maxima = ops.row_max(scaled[:, : blocks * _BLOCK].reshape(-1, blocks, _BLOCK)).reshape(-1, blocks)
        bound = ops.best(maxima, settings.top_k)[0][:, -1:]
        floor = ops.where(bound > floor, bound, floor)
    if settings.min_p > 0.0:
        least = largest + _as_float32(math.log(settings.min_p))
        if on_host and not settings.top_k and settings.top_p == 1.0:
            floor = ops.where(least > floor, least, floor)
    values, token_ids = ops.candidates(scaled, floor)
    if settings.top_k or settings.top_p < 1.0:
        # Adding 0.0 turns -0.0 into 0.0, which the order by bits would tell apart.
        values, token_ids = _filter_sorted(ops, values + 0.0, token_ids, largest, settings)
    if settings.min_p > 0.0:
        values = ops.where(values >= least, values, -math.inf)
    return values, token_ids


def _scaled(ops: ArrayOps[Any], logits: Any, settings: GenerationSettings) -> Any:
    wide = ops.float32(logits)
    if settings.temperature == 1.0:
        return wide
    # Multiplied, not divided: some libraries divide by a scalar through its reciprocal, others do not.
    return wide * _as_float32(1.0 / settings.temperature)


def _winner(ops: ArrayOps[Any], score: Any, token_ids: Any) -> Any:
    """The token of the largest score, of equal ones the lowest id."""
    winners = score == ops.row_max(score)
    return ops.first_column(ops.row_min(ops.where(winners, token_ids, token_ids * 0 + _ID_MAX)))


def _race(ops: ArrayOps[Any], scaled: Any, keys: tuple[Any, Any]) -> Any:
    """Choose without filters, making little noise: most tokens cannot win, and a few cheap bounds show it.

    The score of the largest token, and those of a sample of the vocabulary, bound the winning score from below. A
    token can pass the bound only if it is near enough, and if its noise is large: noise = -log(-log(u)) is at most
    -log(1 - u), so ``1 - u <= exp(value - bound)`` is needed. That is tested on the hash, before any logarithm. The
    margin covers all rounding; what is left is scored exactly, so the choice is that of scoring everything.
    """
    largest = ops.row_max(scaled)
    bound = largest + gumbel(ops, ops.argmax(scaled)[:, None], keys)
    sampled, columns = ops.candidates(scaled[:, ::_SAMPLE_STRIDE], largest - _as_float32(_REACH))
    sample_best = ops.row_max(sampled + gumbel(ops, columns * _SAMPLE_STRIDE, keys))
    bound = ops.where(sample_best > bound, sample_best, bound)
    size = ops.where(bound < 0.0, bound * -1.0, bound) + ops.where(largest < 0.0, largest * -1.0, largest)
    bound = bound - (size * 2.0**-20 + 2.0**-10)
    values, token_ids = ops.candidates(scaled, bound - _as_float32(NOISE_MAX))
    if values.shape[-1] <= _DIRECT_WIDTH:
        return _winner(ops, values + gumbel(ops, token_ids, keys), token_ids)
    bits = ops.noise_bits(token_ids, *keys)
    rest = (ops.float32(bits) * 2.0 + (1.0 - 2.0**24)) * -1.0  # (1 - u) * 2**24, exactly
    spare, columns = ops.candidates(ops.exp(values - bound) * 2.0**24 - rest, bound * 0.0)
    values = ops.where(spare >= 0.0, ops.take(values, columns), -math.inf)
    return _winner(ops, values + gumbel_of_bits(ops, ops.take(bits, columns)), ops.take(token_ids, columns))


def _filter_sorted(
    ops: ArrayOps[Any], values: Any, token_ids: Any, largest: Any, settings: GenerationSettings
) -> tuple[Any, Any]:
    """Sort by (value, lower id first) and keep what top_k and top_p leave; the rest becomes ``-inf``."""
    width = values.shape[-1]
    weights = total = None
    if settings.top_p < 1.0 and not 0 < settings.top_k < width:
        weights = _weights(ops, values, largest)
        total = ops.row_sum(weights)
        if ops.on_host(values) and width > _DIRECT_WIDTH:
            values, token_ids = _nucleus_candidates(ops, values, token_ids, weights, total, largest, settings)
    bits = ops.bits(values)
    ordered = ops.where(bits < 0, -(1 << 31) - 1 - bits, bits)
    keys = ordered * (1 << _ID_BITS) + (_ID_MAX - token_ids)
    if 0 < settings.top_k < values.shape[-1]:
        _, order = ops.best(keys, settings.top_k)
    else:
        order = ops.argsort_descending(keys)
    values, token_ids = ops.take(values, order), ops.take(token_ids, order)
    if settings.top_p < 1.0:
        weights = _weights(ops, values, largest)
        before = ops.row_cumsum(weights) - weights
        kept = before * _SHARE_ONE < (ops.row_sum(weights) if total is None else total) * _share(settings)
        values = ops.where(kept, values, -math.inf)
    return values, token_ids


def _nucleus_candidates(
    ops: ArrayOps[Any],
    values: Any,
    token_ids: Any,
    weights: Any,
    total: Any,
    largest: Any,
    settings: GenerationSettings,
) -> tuple[Any, Any]:
    """Fewer tokens to sort: those above a floor, if they hold the share of the weight that is asked for."""
    for below in _NUCLEUS_STEPS:
        floor = largest - below
        inside = ops.row_sum(ops.where(values >= floor, weights, weights * 0))
        enough = ops.row_min((inside * _SHARE_ONE >= total * _share(settings)) * 1)
        if all(row[0] for row in ops.tolist(enough)):
            values, columns = ops.candidates(values, floor)
            return values, ops.take(token_ids, columns)
    return values, token_ids


def _share(settings: GenerationSettings) -> int:
    return math.ceil(settings.top_p * _SHARE_ONE)


def _weights(ops: ArrayOps[Any], values: Any, largest: Any) -> Any:
    """Probabilities up to a factor, as whole numbers, so that no order of adding them up changes their sum.

    At most 2**21 tokens of weight 2**24, times 2**20, could pass 2**63, but no model's softmax comes near: 2**43 is
    enough for 2**19 equally likely tokens.
    """
    return ops.int64(ops.floor(exp_nonpositive(ops, values - largest) * float(_WEIGHT_ONE)))
