"""Calls before those that count: what an engine records or compiles when it is used is not to fall into the figures."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polydraft.contract.results import GenerationStats

__all__ = ["warm_up"]

_FEW = 8
"""Tokens of the first call: an engine may take seconds for each."""
_STEPS, _SECONDS = 120, 1.0
"""Transformers on a CPU records what has run 40 times. Where that takes more than a second, speeds hardly change."""


def warm_up(call: Callable[[int], GenerationStats], tokens: int) -> None:
    """Decode until an engine has made some steps, or for a second; then collect Python's garbage.

    Loading an engine leaves hundreds of thousands of objects. Looking through them all takes Python 0.2 s, which it
    does once soon after, and seldom later: of eight short outputs on a GPU one took four times as long.

    Args:
        call: Decodes at most so many tokens.
        tokens: Of a call that counts, at most.
    """
    steps, few, began = 0, min(_FEW, tokens), perf_counter()
    while steps < _STEPS and perf_counter() - began < _SECONDS:
        stats = call(few)
        made = stats.num_target_steps or stats.num_tokens
        if not made:  # nothing that could be warmed up
            return
        steps, few = steps + made, tokens
    gc.collect()
