"""Direct use of a stepping engine's primitives: greedy, one sequence at a time, logits kept."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from polydraft.sampling.numpy_ops import array_ops_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft.contract import EngineSequence, Sampler, Step, SteppingEngine, TokenLogprobs
    from polydraft.contract.arrays import ArrayOps

__all__ = ["GreedySampler", "logits_of", "open_sequence", "prefill_logits"]

Logits = npt.NDArray[np.float32]


class GreedySampler:
    """Implements ``polydraft.contract.Sampler`` for temperature 0, apart from the core's rule."""

    needs_prefix = False

    def __init__(self, ops: ArrayOps[Any]) -> None:
        self._ops = ops

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """The largest logit of each row."""
        return [int(token) for token in np.argmax(self._ops.numpy(logits), axis=-1)], None

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """The largest logit, as the engine's own array."""
        return self._ops.argmax(logits)


def greedy(engine: SteppingEngine) -> Sampler:
    """A greedy sampler for an engine's arrays."""
    return GreedySampler(array_ops_of(engine))


@contextmanager
def open_sequence(engine: SteppingEngine) -> Iterator[EngineSequence]:
    """A new sequence, closed at the end of the ``with`` block."""
    sequence = engine.open_sequence()
    try:
        yield sequence
    finally:
        sequence.close()


def logits_of(step: Step) -> Logits:
    """The logits of a step that was asked to keep them: float32, shape (rows, vocab).

    Raises:
        AssertionError: The engine gave none.
    """
    assert step.logits is not None, "The step has no logits, though keep_logits=True was given."
    return step.logits.numpy()


def prefill_logits(engine: SteppingEngine, token_ids: Sequence[int]) -> Logits:
    """The logits after one fresh prefill: shape (1, vocab)."""
    with open_sequence(engine) as sequence:
        return logits_of(sequence.prefill(list(token_ids), greedy(engine), keep_logits=True))
