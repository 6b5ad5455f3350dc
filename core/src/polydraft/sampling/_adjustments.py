"""Biases, penalties and bans: settings that change single tokens' logits. Only the affected entries are touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps
    from polydraft.contract.requests import GenerationSettings

__all__ = ["Bans", "Penalties", "wants_penalties"]

Ints = npt.NDArray[np.int64]


def wants_penalties(settings: GenerationSettings) -> bool:
    """Whether a setting depends on the tokens before a position."""
    return settings.repetition_penalty != 1.0 or settings.presence_penalty != 0.0 or settings.frequency_penalty != 0.0


class Penalties:
    """``logit_bias`` and the three penalties, in this order.

    A table holds each affected token, with its numbers of occurrences in prompt and output. It grows with the text and
    never shrinks; a token whose counts are 0 has no effect. Factors are computed on the host in float32, and each
    operation rounds once: so every array library gives the same bits.

    Args:
        settings: The generation's settings.
        prompt_length: Number of prompt tokens; positions from here on are output.
    """

    def __init__(self, settings: GenerationSettings, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._repetition = settings.repetition_penalty != 1.0
        # For positive logits, and for negative ones. Both multiply: some libraries divide by way of the reciprocal.
        self._factors = np.float32(1.0 / settings.repetition_penalty), np.float32(settings.repetition_penalty)
        self._frequency = np.float32(settings.frequency_penalty)
        self._presence = np.float32(settings.presence_penalty)
        self._subtracts = bool(settings.frequency_penalty or settings.presence_penalty)
        self._biased = bool(settings.logit_bias)
        # Token id -> column of the table, which doubles when it is full.
        self._index: dict[int, int] = {}
        self._token_ids: Ints = np.zeros(64, np.int64)
        self._counts = np.zeros((2, 64), np.int32)  # occurrences in the prompt; in the output
        # Biased tokens take the first entries, so that ``_biases`` lines up with the start of the table.
        for token_id in settings.logit_bias:
            self._entry(token_id)
        self._biases = np.array(list(settings.logit_bias.values()), np.float32)

    def changed(self, position: int, token_id: int, times: int) -> None:
        """Update the counts: the history has committed a token (``times`` 1) or taken it back (-1)."""
        is_output = position >= self._prompt_length
        if is_output or self._repetition:
            # Tokens of the prompt count for the repetition penalty only; without it they need no entry.
            entry = self._entry(token_id)  # may replace the table
            self._counts[int(is_output), entry] += times

    def apply(self, ops: ArrayOps[Any], logits: Any, committed: int, run_token_ids: Sequence[int]) -> Any:
        """The changed logits; the given array if nothing applies.

        Args:
            ops: The operations of the logits' library.
            logits: Float32, shape (rows, vocab). Row i follows the committed tokens and ``run_token_ids[:i + 1]``; a
                single row follows all of them.
            committed: Number of committed tokens: the position of ``run_token_ids[0]``.
            run_token_ids: Tokens after the committed ones; empty if no penalty is in use.
        """
        rows = logits.shape[0]
        # (first row that sees the run token, its position, its entry)
        running = [(i if rows > 1 else 0, committed + i, self._entry(t)) for i, t in enumerate(run_token_ids)]
        size = len(self._index)
        if not size:
            return logits
        # (2, rows, size): rows have different counts, since each sees one run token more than the row before.
        counts = np.repeat(self._counts[:, None, :size], rows, axis=1)
        for row, position, entry in running:
            is_output = position >= self._prompt_length
            if is_output or self._repetition:
                counts[int(is_output), row:, entry] += 1  # counts: (2, rows, size)
        in_prompt, in_output = counts.reshape(2, rows * size)
        # Flat (row, column) pairs, row after row: only these entries are read and replaced, not all of (rows, vocab).
        row_indices = np.repeat(np.arange(rows), size)
        columns = np.tile(self._token_ids[:size], rows)
        values = ops.entries(logits, row_indices, columns)
        if self._biased:
            biases = np.zeros((rows, size), np.float32)
            biases[:, : len(self._biases)] = self._biases
            values = values + ops.from_numpy(biases.reshape(-1), logits)
        if self._repetition:
            seen = (in_prompt + in_output) > 0
            positive, negative = (np.where(seen, factor, np.float32(1.0)) for factor in self._factors)
            values = ops.where(
                values > 0, values * ops.from_numpy(positive, logits), values * ops.from_numpy(negative, logits)
            )
        if self._subtracts:
            penalty = self._frequency * in_output.astype(np.float32) + self._presence * (in_output > 0)
            values = values - ops.from_numpy(penalty.astype(np.float32), logits)
        return ops.with_entries(logits, row_indices, columns, values)

    def _entry(self, token_id: int) -> int:
        found = self._index.get(token_id)
        if found is not None:
            return found
        entry = self._index[token_id] = len(self._index)
        if entry == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)], axis=1)
        self._token_ids[entry] = token_id
        return entry


class Bans:
    """Tokens that may not be chosen: anywhere, or before the output is long enough to end.

    Args:
        banned: Tokens that are never chosen.
        ends: Tokens that are not chosen before position ``free_from``.
        free_from: Absolute position.
    """

    def __init__(self, banned: Iterable[int], ends: Iterable[int], free_from: int) -> None:
        always = set(banned)
        self._always: Ints = np.array(sorted(always), np.int64)
        self._early: Ints = np.array(sorted(always | set(ends)), np.int64)
        self._free_from = free_from

    def end_before(self, position: int) -> bool:
        """Whether every token may be chosen from this position on."""
        return not len(self._always) and position >= self._free_from

    def apply(self, ops: ArrayOps[Any], logits: Any, first_position: int) -> Any:
        """The logits (rows, vocab) with ``-inf`` for tokens that may not be chosen; float32 if there are any."""
        rows = logits.shape[0]
        # How many of the first rows choose for positions before ``free_from``.
        early = min(max(self._free_from - first_position, 0), rows)
        columns = [self._early] * early + [self._always] * (rows - early)
        if not any(len(ids) for ids in columns):
            return logits
        row_indices = np.repeat(np.arange(rows), [len(ids) for ids in columns])
        return ops.with_entries(ops.float32(logits), row_indices, np.concatenate(columns), -math.inf)
