"""What the settings mean, written a second time: the probabilities of the next token, in float64 numpy.

The core's own implementation chooses tokens on any device; this one is short and slow, and independent of it. Checks
compare both, and the settings of engines that keep their own sampler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from polydraft.contract import GenerationSettings

__all__ = ["adjusted", "filtered", "next_token"]

Row = npt.NDArray[Any]


def next_token(
    logits: Row,
    settings: GenerationSettings,
    prompt: Sequence[int],
    output: Sequence[int],
    eos_token_ids: Collection[int] = (),
) -> Row:
    """The probabilities of the next token: shape (vocab,), float64; at temperature 0 all on the chosen one.

    Args:
        logits: The target's raw logits after prompt and output, shape (vocab,).
        settings: All of them but ``logits_processor`` are honoured.
        prompt: The prompt's tokens.
        output: The tokens generated so far.
        eos_token_ids: Suppressed by ``min_new_tokens``, with the stop ids.
    """
    forced = settings.forced_token_ids.get(len(output))
    if forced is not None:
        return _certain(len(logits), forced)
    row = adjusted(logits, settings, prompt, output, eos_token_ids)
    if settings.temperature == 0.0:
        return _certain(len(row), int(row.argmax()))
    return filtered(row, settings)


def adjusted(
    logits: Row,
    settings: GenerationSettings,
    prompt: Sequence[int],
    output: Sequence[int],
    eos_token_ids: Collection[int] = (),
) -> Row:
    """Logits after biases, penalties and bans: shape (vocab,), float64. Arguments as for ``next_token``."""
    row: Row = logits.astype(np.float64)
    for token, bias in settings.logit_bias.items():
        row[token] += bias
    seen = np.unique(np.asarray([*prompt, *output], dtype=np.int64))
    values = row[seen]
    row[seen] = np.where(values > 0, values / settings.repetition_penalty, values * settings.repetition_penalty)
    tokens, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
    row[tokens] -= settings.frequency_penalty * counts + settings.presence_penalty
    banned = list(settings.banned_token_ids)
    if len(output) < settings.min_new_tokens:
        banned += [*eos_token_ids, *settings.stop_token_ids]
    row[banned] = -np.inf
    return row


def filtered(row: Row, settings: GenerationSettings) -> Row:
    """Temperature and filters on adjusted logits: probabilities, shape (vocab,). The temperature is above 0."""
    scaled = row / settings.temperature
    # Of equal logits the lower id comes first.
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    if settings.top_k:
        order = order[: settings.top_k]
    shares = _softmax(scaled[order])
    if settings.top_p < 1.0:
        # The token that crosses top_p is kept.
        order = order[np.cumsum(shares) - shares < settings.top_p]
    order = order[_softmax(scaled)[order] >= settings.min_p * _softmax(scaled)[order].max() * (1 - 1e-12)]
    if settings.typical_p < 1.0:
        shares = _softmax(scaled[order])
        surprise = -np.log(np.maximum(shares, 1e-300))
        distance = np.abs(surprise - (shares * surprise).sum())
        nearest = np.lexsort((order, distance))
        kept = np.cumsum(shares[nearest]) - shares[nearest] < settings.typical_p
        order = order[nearest[kept]]
    probabilities = np.zeros(len(scaled))
    probabilities[order] = _softmax(scaled[order])
    return probabilities


def _softmax(values: Row) -> Row:
    weights: Row = np.exp(values - values.max())
    shares: Row = weights / weights.sum()
    return shares


def _certain(size: int, token: int) -> Row:
    probabilities = np.zeros(size)
    probabilities[token] = 1.0
    return probabilities
