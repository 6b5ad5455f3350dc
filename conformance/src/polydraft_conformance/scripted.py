"""A drafter that follows a script: a given number of right drafts, then wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract import EngineSequence, Proposal, Sampler

from polydraft_conformance.counting import WrappedSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ScriptedSequence"]


class ScriptedSequence(WrappedSequence):
    """Proposes drafts made from the known output instead of the engine's own.

    Args:
        inner: The engine's sequence; its own drafter is not used.
        truth: Prompt and plain output.
        vocab_size: Number of tokens.
        right: Number of the round, from 0 -> how many of its drafts are right; the others are wrong.
        first_length: Most drafts of the first round (default: k), to shift all later rounds.
    """

    def __init__(
        self,
        inner: EngineSequence,
        truth: Sequence[int],
        vocab_size: int,
        right: Callable[[int], int],
        first_length: int | None = None,
    ) -> None:
        super().__init__(inner)
        self.truth = list(truth)
        self.vocab_size = vocab_size
        self.script = right
        self.first_length = first_length
        self.round = 0
        self.drafted = 0
        self.right = 0
        """Drafts proposed that the target will choose."""

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """The script's drafts: at most k, and none beyond the known output."""
        if self.round == 0 and self.first_length is not None:
            k = min(k, self.first_length)
        start = self.length + 1
        coming = self.truth[start : start + k]
        right = min(self.script(self.round), len(coming))
        wrong = [(token + 1) % self.vocab_size for token in coming[right:]]
        self.round += 1
        self.drafted += len(coming)
        self.right += right
        return Proposal([*coming[:right], *wrong])
