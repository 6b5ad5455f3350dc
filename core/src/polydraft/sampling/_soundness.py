"""Which rows of logits a token may be chosen from: the choice from any other row is arbitrary, but looks like a token.

A row is sound if it has no NaN, no +Inf and at least one finite number; models do give -Inf to single tokens. Its
largest number tells: that is NaN, +Inf or -Inf exactly where the row is not sound, since maxima propagate NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps

__all__ = ["UNSOUND", "largest_logits", "telling_logits", "with_unsound"]

UNSOUND = -1
"""In place of a token: its row is not sound."""


def largest_logits(ops: ArrayOps[Any], logits: Any) -> Any:
    """The largest number of each row (rows, vocab), which is finite exactly where the row is sound: shape (rows,)."""
    return ops.first_column(ops.row_max(logits))


def telling_logits(logits: Any, chosen: Any) -> list[float]:
    """The logits of the tokens that numpy chose from rows (rows, vocab): finite exactly where the row is sound.

    Without a pass over the rows: of a row that is not sound, numpy's argmax is the first NaN, or the largest number.
    """
    # One by one: for the few rows of a step that is faster than an array of indices.
    token_ids = chosen.tolist()
    if len(token_ids) == 1:
        return [logits.item(0, token_ids[0])]
    return [logits.item(row, token_id) for row, token_id in enumerate(token_ids)]


def with_unsound(ops: ArrayOps[Any], telling: Any, chosen: Any) -> list[int]:
    """The ids in ``chosen`` (rows,), ``UNSOUND`` where ``telling`` is not finite; waits for a device once.

    ``telling``: a list for numpy, else an array (rows,).
    """
    if isinstance(telling, list):
        token_ids: list[int] = chosen.tolist()
        if not all(map(math.isfinite, telling)):
            return [
                token_id if math.isfinite(value) else UNSOUND
                for token_id, value in zip(token_ids, telling, strict=True)
            ]
        return token_ids
    if isinstance(telling, np.ndarray):
        sound: Any = np.isfinite(telling)
    else:
        # Infinity less infinity is NaN: the fewest operations, as each costs a launch on a device.
        sound = telling - telling == 0
    return ops.tolist(ops.where(sound, chosen, UNSOUND))
