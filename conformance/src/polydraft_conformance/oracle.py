"""What the settings mean, written a second time: the probabilities of the next token, in float64 numpy.

The core's own implementation chooses tokens on any device; this one is short and slow, and independent of it. Checks
compare both, and the settings of engines that keep their own sampler.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from polydraft.contract import GenerationSettings

__all__ = ["OnTheEdgeError", "adjusted", "filtered", "next_token"]

Row = npt.NDArray[Any]


class OnTheEdgeError(Exception):
    """Rounding decides what is kept: a token lies at a filter's edge."""


def next_token(
    logits: Row,
    settings: GenerationSettings,
    prompt: Sequence[int],
    output: Sequence[int],
    eos_token_ids: Collection[int] = (),
    slack: float | None = None,
) -> Row:
    """The probabilities of the next token: shape (vocab,), float64; at temperature 0 all on the chosen one.

    Args:
        logits: The target's raw logits after prompt and output, shape (vocab,).
        settings: All of them are honoured; of logits processors, pure functions.
        prompt: The prompt's tokens.
        output: The tokens generated so far.
        eos_token_ids: Suppressed by ``min_new_tokens``, with the stop ids.
        slack: How far the logits may be off.

    Raises:
        OnTheEdgeError: Logits off by ``slack`` could leave other tokens.
    """
    forced = settings.forced_token_ids.get(len(output))
    if forced is not None:
        return _certain(len(logits), forced)
    row = adjusted(logits, settings, prompt, output, eos_token_ids)
    if slack is not None:
        slack *= max(settings.repetition_penalty, 1 / settings.repetition_penalty)
    if settings.temperature == 0.0:
        if slack is not None:
            second, best = np.partition(row, -2)[-2:]
            if best - second <= 2 * slack:
                raise OnTheEdgeError
        return _certain(len(row), int(row.argmax()))
    return filtered(row, settings, None if slack is None else slack / settings.temperature)


def adjusted(
    logits: Row,
    settings: GenerationSettings,
    prompt: Sequence[int],
    output: Sequence[int],
    eos_token_ids: Collection[int] = (),
) -> Row:
    """Logits after biases, penalties, processor and bans: shape (vocab,), float64. Arguments as for ``next_token``."""
    row: Row = logits.astype(np.float64)
    for token, bias in settings.logit_bias.items():
        row[token] += bias
    if settings.repetition_penalty != 1.0:
        seen = np.unique(np.asarray([*prompt, *output], dtype=np.int64))
        values = row[seen]
        row[seen] = np.where(values > 0, values / settings.repetition_penalty, values * settings.repetition_penalty)
    if settings.frequency_penalty or settings.presence_penalty:
        tokens, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
        row[tokens] -= settings.frequency_penalty * counts + settings.presence_penalty
    if settings.logits_processor is not None:
        row = settings.logits_processor((*prompt, *output), row[None])[0]
    banned = list(settings.banned_token_ids)
    if len(output) < settings.min_new_tokens:
        banned += [*eos_token_ids, *settings.stop_token_ids]
    row[banned] = -np.inf
    return row


def filtered(row: Row, settings: GenerationSettings, slack: float | None = None) -> Row:
    """Temperature and filters on adjusted logits: probabilities, shape (vocab,). The temperature is above 0.

    ``slack`` as for ``next_token``, divided by the temperature.
    """
    scaled = row / settings.temperature
    # Of equal logits the lower id comes first.
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    if settings.top_k:
        order = _cut(order, -scaled[order], settings.top_k, slack)
    shares = _softmax(scaled[order])
    if settings.top_p < 1.0:
        # The token that crosses top_p is kept.
        before = np.cumsum(shares) - shares
        _far_from(before, settings.top_p, slack)
        order = _cut(order, -scaled[order], int((before < settings.top_p).sum()), slack)
    if settings.min_p > 0.0:
        least = scaled[order[0]] + math.log(settings.min_p)
        _far_from(scaled[order], least, slack)
        order = order[scaled[order] >= least - 1e-12]
    if settings.typical_p < 1.0:
        shares = _softmax(scaled[order])
        surprise = -np.log(np.maximum(shares, 1e-300))
        distance = np.abs(surprise - (shares * surprise).sum())
        nearest = np.lexsort((order, distance))
        before = np.cumsum(shares[nearest]) - shares[nearest]
        _far_from(before, settings.typical_p, slack)
        # The entropy moves with the logits.
        wide = None if slack is None else 2 * slack
        order = _cut(order[nearest], distance[nearest], int((before < settings.typical_p).sum()), wide)
    probabilities = np.zeros(len(scaled))
    probabilities[order] = _softmax(scaled[order])
    return probabilities


def _cut(order: npt.NDArray[Any], keys: Row, count: int, slack: float | None) -> npt.NDArray[Any]:
    """The first ``count`` tokens of an order by rising ``keys``."""
    # Keys of banned tokens are infinite.
    if slack is None:
        return order[:count]
    within = 0 < count < len(keys) and np.isfinite(keys[count - 1])
    if within and keys[count] - keys[count - 1] <= 2 * slack:
        raise OnTheEdgeError
    return order[:count]


def _far_from(values: Row, edge: float, slack: float | None) -> None:
    """Whether rounding could move one of the values across the edge."""
    if slack is not None and (np.abs(values - edge) <= 2 * slack).any():
        raise OnTheEdgeError


def _softmax(values: Row) -> Row:
    weights: Row = np.exp(values - values.max())
    shares: Row = weights / weights.sum()
    return shares


def _certain(size: int, token: int) -> Row:
    probabilities = np.zeros(size)
    probabilities[token] = 1.0
    return probabilities
