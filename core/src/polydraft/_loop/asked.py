"""What the loop asks of a sequence, and the checks that the sequence did just that.

An engine that chooses for other ids or positions than it was given writes text that looks right: the sampler compares
what reaches it with what the loop has asked for, and the loop ``length``. That costs a microsecond or two in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft._loop.returned import checked_proposal, checked_step, defect
from polydraft.sampling._asked import Asked
from polydraft.sampling._soundness import UNSOUND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract.stepping import EngineSequence, Step
    from polydraft.sampling._sampler import RuleSampler

__all__ = ["AskedSequence"]


class AskedSequence:
    """A sequence of the engine as the loop uses it: every call is checked against the contract.

    Args:
        sequence: The engine's.
        sampler: Chooses the tokens, and checks what for.
        vocab_size: Token ids lie below it.
        wants_logprobs: Whether every step must bring log-probabilities.
        stored: How many tokens of the prompt it stores: 0 if it is empty.
    """

    def __init__(
        self, sequence: EngineSequence, sampler: RuleSampler, vocab_size: int, *, wants_logprobs: bool, stored: int = 0
    ) -> None:
        self.sequence = sequence
        self.sound = True
        """Whether no token has been unsound: what it was chosen from may have left NaN in the KV."""
        self._sampler = sampler
        self._asked = sampler.asked = Asked()
        self._vocab_size = vocab_size
        self.verified = False
        """Whether the target has run the last drafts, too."""
        self._wants_logprobs = wants_logprobs
        self.stored = stored
        """How many tokens the sequence must store."""
        if sequence.length != stored:
            raise defect(f"A sequence with {stored} tokens was opened, and its `length` is {sequence.length}.")

    def prefill(self, token_ids: Sequence[int]) -> Step:
        """Run what is not stored of the prompt: a step with one chosen token."""
        size = len(token_ids)
        self._asked.ask("prefill", size, [token_ids[-1]])
        rest = token_ids[self.stored :]
        step: Step = checked_step(
            self.sequence.prefill(rest, self._sampler), "prefill", len(rest), self._wants_logprobs
        )
        self.stored = size
        if self.sequence.length != size:
            raise defect(
                f"After a prefill of {size} ids, `length` is {self.sequence.length}: it counts the tokens that are "
                f"stored, here the prompt's {size}; the token that prefill chose is stored by the next verify."
            )
        return step

    def verify(self, token_ids: list[int]) -> Step:
        """Run the newest token and the drafts: a step with one chosen token for each."""
        rows, stored = len(token_ids), self.stored
        self._asked.ask("verify", stored + 1, token_ids)
        step: Step = checked_step(self.sequence.verify(token_ids, self._sampler), "verify", rows, self._wants_logprobs)
        self.stored += rows
        if self.sequence.length != stored + rows:
            raise defect(
                f"verify ran {rows} ids after {stored} stored ones, and `length` is then {self.sequence.length}, not "
                f"{stored + rows}: every id that is run is stored, the newest token and the drafts."
            )
        self.sound = self.sound and UNSOUND not in step.token_ids
        return step

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.sequence.rollback(length)
        self.stored = length
        if self.sequence.length != length:
            raise defect(
                f"After rollback({length}), `length` is {self.sequence.length}: its argument is the number of tokens "
                "to keep, not the number to forget."
            )

    def propose(self, newest: int, k: int) -> list[int]:
        """At most k drafts after the newest token."""
        self._asked.ask("propose", self.stored + 1, [newest])
        proposal = self.sequence.propose(newest, k, self._sampler)
        draft = checked_proposal(proposal, newest, k, self._vocab_size)
        self.verified = proposal.verified
        if self.sequence.length != self.stored:
            raise defect(
                f"propose changed `length` from {self.stored} to {self.sequence.length}: drafts are stored when "
                "verify runs them, and not before."
            )
        return draft
