"""``exactness="bitwise"``: steps of a fixed number of rows, and the check that this device keeps rows apart.

In low precision a forward over k+1 tokens and one over a single token differ in their last bits, because kernels are
chosen by shape, and a near tie then turns. Where every step has one shape, a row's bits depend on its prefix alone, as
long as the kernels treat all rows alike; whether they do is measured when a pair is loaded, never assumed.
"""

from __future__ import annotations

import torch
from polydraft.errors import UnsupportedError

from polydraft_transformers.decoder import Decoder

__all__ = ["check_rows", "fixed_rows"]

_PROMPT_TOKENS = 12


def fixed_rows(k: int) -> int:
    """Rows of a fixed step: a multiple of 8, so that sessions with k up to 7, or without a drafter, give equal bits."""
    return -(-(k + 1) // 8) * 8


def check_rows(target: Decoder) -> None:
    """Run tokens in one full step, then some of them alone, padded, and compare the bits of logits and hidden rows.

    Raises:
        UnsupportedError: A row's bits depend on its place in the step or on its neighbours.
    """
    rows = target.step_rows
    vocabulary = int(target.lm_head.weight.shape[0])
    tokens = [(7 + 31 * index) % vocabulary for index in range(_PROMPT_TOKENS + rows)]
    cache = target.open_cache()
    with torch.inference_mode():
        target.prefill(cache, tokens[:_PROMPT_TOKENS])
        together = [part.clone() for part in target.step(cache, tokens[_PROMPT_TOKENS:], rows)]
        for row in (rows - 1, rows // 2, 1):
            cache.rollback(_PROMPT_TOKENS + row)
            alone = target.step(cache, tokens[_PROMPT_TOKENS + row : _PROMPT_TOKENS + row + 1], rows)
            if not all(torch.equal(one[0], all_rows[row]) for one, all_rows in zip(alone, together, strict=True)):
                dtype = str(target.dtype).removeprefix("torch.")
                raise UnsupportedError(
                    f"exactness='bitwise' does not hold here: on {target.device} in {dtype}, row {row} of a step of "
                    f"{rows} differs in bits from the same token alone.",
                    "Use exactness='standard', another dtype, or another experts_implementation.",
                )
    target.give_back(cache)
