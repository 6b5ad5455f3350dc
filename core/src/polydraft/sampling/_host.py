"""The rule on the host: the choices of ``rule.choose_tokens``, found in numpy without computing noise for every token.

On the host, code can branch on values and continue with the few tokens that matter; each branch would wait for a
device. Rows are done one at a time, since one row of a large vocabulary fits into the CPU's cache.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polydraft.sampling.noise import NOISE_MAX, gumbel, gumbel_of_bits, row_keys
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import REACH, SHARE_ONE, as_float32, scale_of, share_of, surprise, token_weights

if TYPE_CHECKING:
    from polydraft.contract.requests import GenerationSettings

__all__ = ["choose_on_host", "kept_on_host"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Keys = tuple[Any, Any]

_OPS = NumpyOps()
# These change how long a choice takes, never the choice.
_SAMPLE_STRIDE = 64  # distance of the values that are scored first, for a lower bound of the winning score
_BLOCK = 256  # the maxima of blocks of this many values give a lower bound for top_k
_FEW = 512  # up to this many values are scored directly
_STEPS_PER_NAT = 16  # bins per unit of logit / temperature, to find the cut of top_p


def choose_on_host(logits: Floats, settings: GenerationSettings, seed: int, stream: int, first_position: int) -> Ints:
    """Choose one token per row; arguments and result as for ``rule.choose_tokens``, with numpy arrays."""
    if settings.temperature == 0.0:
        return np.asarray(logits.argmax(axis=-1))
    low, high = row_keys(seed, stream, range(first_position, first_position + len(logits)))
    # Unfiltered rows skip ``kept_on_host``: the race finds the winner among all tokens.
    filtered = settings.top_k or settings.top_p < 1.0 or settings.min_p > 0.0 or settings.typical_p < 1.0
    chosen = np.empty(len(logits), np.int64)
    for row, own in enumerate(logits):
        if not np.isfinite(own.max()):  # nothing is allowed, or the engine made NaN: the definition's choice
            chosen[row] = own.argmax()
            continue
        keys = np.array([[low[row]]]), np.array([[high[row]]])
        if filtered:
            values, token_ids = kept_on_host(own, settings)
            chosen[row] = token_ids[_race(values, token_ids, keys)]
        else:
            chosen[row] = _race(_scaled(own, settings), None, keys)
    return chosen


def kept_on_host(logits: Floats, settings: GenerationSettings) -> tuple[Floats, Ints]:
    """The tokens of one row that the filters keep, without those that cannot win whatever the noise.

    Args:
        logits: Shape (vocab,).
        settings: temperature (above 0), top_k, top_p, min_p and typical_p are read.

    Returns:
        Float32 logits divided by the temperature, and the token ids, ascending; at least one.
    """
    scaled = _scaled(logits, settings)
    largest = scaled.max()
    floor = largest - np.float32(as_float32(REACH))
    # Below ``floor`` a token cannot win; below ``least`` min_p drops it. min_p comes after top_k and top_p, so
    # ``least`` may raise ``floor`` only where neither of them counts the tokens in between.
    least = floor
    if settings.min_p > 0.0:
        least = largest + np.float32(as_float32(math.log(settings.min_p)))
    blocks = len(scaled) // _BLOCK
    # With almost as many tokens as blocks the bound would be too low to help.
    if 0 < settings.top_k <= blocks // 2:
        # top_k blocks have a maximum of at least this, so the top_k tokens are not below it.
        maxima = scaled[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=-1)
        floor = max(floor, np.partition(maxima, blocks - settings.top_k)[blocks - settings.top_k])
    elif not settings.top_k and settings.top_p == 1.0:
        floor = max(floor, least)
    token_ids = np.flatnonzero(scaled >= floor)
    values = scaled[token_ids]
    # In the rule's order. The ids stay ascending, so that the first of equal values has the lowest id.
    if settings.top_k:
        values, token_ids = _largest(values, token_ids, settings.top_k)
    if settings.top_p < 1.0:
        values, token_ids = _nucleus(values, token_ids, largest, settings)
    if settings.min_p > 0.0:
        left = values >= least
        values, token_ids = values[left], token_ids[left]
    if settings.typical_p < 1.0:
        values, token_ids = _typical(values, token_ids, largest, settings)
    return values, token_ids


def _scaled(logits: Floats, settings: GenerationSettings) -> Floats:
    return logits if settings.temperature == 1.0 else logits * np.float32(scale_of(settings))


def _largest(values: Floats, token_ids: Ints, count: int) -> tuple[Floats, Ints]:
    """The ``count`` largest in the order (value, lower id). The ids are ascending, and stay ascending."""
    surplus = len(values) - count
    if surplus <= 0:
        return values, token_ids
    # Entry ``surplus`` of the ascending order is the count-th largest value.
    return _from(values, token_ids, np.partition(values, surplus)[surplus], count)


def _from(values: Floats, token_ids: Ints, least: np.float32, count: int) -> tuple[Floats, Ints]:
    """The ``count`` largest values; ``least`` is the smallest of them."""
    left = values > least
    # Of the values equal to the last one as many as there is room for, lowest ids first.
    left[np.flatnonzero(values == least)[: count - np.count_nonzero(left)]] = True
    return values[left], token_ids[left]


def _nucleus(values: Floats, token_ids: Ints, largest: np.float32, settings: GenerationSettings) -> tuple[Floats, Ints]:
    """The largest tokens that hold the share top_p of the weight. Only those near the cut are sorted."""
    weights = token_weights(_OPS, values, largest)
    needed = int(weights.sum()) * share_of(settings.top_p)
    # Bins of 1/16 nat, the largest value in bin 0: whole bins are summed, and only the bin at the cut is sorted.
    steps = ((largest - values) * np.float32(_STEPS_PER_NAT)).astype(np.int64)
    sums = np.bincount(steps, weights=weights).astype(np.int64)  # exact: below 2**53
    before = np.cumsum(sums) - sums
    # The last bin of which at least one token is kept.
    last = int(np.flatnonzero(before * SHARE_ONE < needed)[-1])
    at_cut = np.flatnonzero(steps == last)
    # Equal values may come in any order: only the value at the cut is used, and ``_from`` breaks ties by id.
    at_cut = at_cut[np.argsort(-values[at_cut])]
    within = before[last] + np.cumsum(weights[at_cut]) - weights[at_cut]
    more = int(np.count_nonzero(within * SHARE_ONE < needed))  # at least 1: the step's first token is one
    return _from(values, token_ids, values[at_cut[more - 1]], int(np.count_nonzero(steps < last)) + more)


def _typical(values: Floats, token_ids: Ints, largest: np.float32, settings: GenerationSettings) -> tuple[Floats, Ints]:
    """The tokens nearest to the mean surprise that hold the share typical_p of the weight; their ids stay ascending."""
    weights, own = token_weights(_OPS, values, largest), surprise(_OPS, values, largest)
    needed = int(weights.sum()) * share_of(settings.typical_p)
    distance = np.abs(own - int((weights * own).sum()) // int(weights.sum()))
    # One bin per distance (below 2**18). Tokens in one bin are kept from the lowest id on, as the ids are ascending.
    sums = np.bincount(distance, weights=weights).astype(np.int64)  # exact: below 2**53
    before = np.cumsum(sums) - sums
    last = int(np.flatnonzero(before * SHARE_ONE < needed)[-1])
    at_cut = np.flatnonzero(distance == last)
    within = before[last] + np.cumsum(weights[at_cut]) - weights[at_cut]
    left = distance < last
    left[at_cut[within * SHARE_ONE < needed]] = True
    return values[left], token_ids[left]


def _race(values: Floats, token_ids: Ints | None, keys: Keys) -> int:
    """Index of the largest value plus noise; the first of equal ones.

    The scores of the largest value and of a sample bound the winning score from below. A token can reach the bound
    only if its value is near enough and its noise large: noise = -log(-log(u)) is at most -log(1 - u), so
    ``1 - u <= exp(value - bound)`` is needed, which is tested on the hash before any logarithm. The margin covers all
    rounding, and the tokens left are scored exactly, so the winner is that of scoring all of them.

    Args:
        values: Shape (n,).
        token_ids: Ascending, shape (n,); None: 0, 1, ...
        keys: The row's keys, shape (1, 1) each.
    """

    def ids(indices: Ints) -> Ints:
        return (indices if token_ids is None else token_ids[indices])[None]

    # Scoring so few costs less than finding a bound.
    if len(values) <= _FEW:
        return int((values + gumbel(_OPS, ids(np.arange(len(values))), keys)[0]).argmax())
    top = int(values.argmax())
    largest = float(values[top])
    # Every 64th value near the top, and the top itself: any score is a valid bound, and more of them raise it.
    tried = np.append(np.flatnonzero(values[::_SAMPLE_STRIDE] >= largest - REACH) * _SAMPLE_STRIDE, top)
    bound = float((values[tried] + gumbel(_OPS, ids(tried), keys)[0]).max())
    # Absolute and relative margin for float32 rounding; too large a margin costs time only.
    bound -= 2.0**-10 + 2.0**-20 * (abs(bound) + abs(largest))
    # Not even the largest noise lifts the others to the bound.
    near = np.flatnonzero(values >= bound - NOISE_MAX)
    values = values[near]
    bits = _OPS.noise_bits(ids(near), *keys)[0]
    if len(near) > _FEW:
        rest = np.float32(2.0**24 - 1.0) - _OPS.float32(bits) * np.float32(2.0)  # (1 - u) * 2**24, exactly
        left = np.flatnonzero(rest <= np.exp(values - np.float32(bound)) * np.float32(2.0**24))
        near, values, bits = near[left], values[left], bits[left]
    return int(near[(values + gumbel_of_bits(_OPS, bits)).argmax()])
