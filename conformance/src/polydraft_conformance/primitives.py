"""Direct use of a stepping engine's primitives: greedily, with logits."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from polydraft.verification import GreedySampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Step, SteppingEngine
    from polydraft.verification import Logits

__all__ = ["logits_of", "prefill_logits"]


def logits_of(step: Step) -> Logits:
    """The logits of a step that was asked to keep them: float32, shape (rows, vocab).

    Raises:
        AssertionError: The engine gave none.
    """
    assert step.logits is not None, "The step has no logits, though keep_logits=True was given."
    return step.logits.numpy()


def prefill_logits(engine: SteppingEngine, token_ids: Sequence[int]) -> Logits:
    """The logits after one fresh prefill: shape (1, vocab)."""
    with closing(engine.open_sequence()) as sequence:
        return logits_of(sequence.prefill(list(token_ids), GreedySampler(engine), keep_logits=True))
