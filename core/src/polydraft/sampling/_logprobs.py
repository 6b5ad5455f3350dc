"""Log-probabilities of chosen tokens, from the target's raw logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polydraft.contract.results import TokenLogprobs

__all__ = ["token_logprobs"]


def token_logprobs(logits: npt.NDArray[np.float32], token_ids: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Natural-log probabilities, before temperature and filters.

    Args:
        logits: Shape (rows, vocab), float32.
        token_ids: The chosen token of each row.
        top: How many of the best tokens to list as well.
    """
    # float64: the sum has as many terms as the vocabulary has tokens.
    wide = logits.astype(np.float64)
    # Rows after a rejected draft may hold anything; their entries are never read.
    with np.errstate(invalid="ignore"):
        shifted = wide - wide.max(axis=-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    records = []
    for row, token_id in zip(logprobs, token_ids, strict=True):
        # The last key comes first: by logit, then the lower id, as the rule breaks ties.
        best = np.lexsort((np.arange(len(row)), -row))[:top] if top else ()
        records.append(
            TokenLogprobs(
                token_id=token_id, logprob=float(row[token_id]), top=tuple((int(i), float(row[i])) for i in best)
            )
        )
    return tuple(records)
