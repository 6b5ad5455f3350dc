"""What the loop asks of a sequence, and the checks that the sequence did just that.

An engine that chooses for other ids or positions than it was given writes text that looks right: the sampler compares
what reaches it with what the loop has asked for, and the loop ``length``. That costs a microsecond or two in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft._loop.returned import checked_proposal, checked_step, defect
from polydraft.sampling._asked import Asked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract.stepping import EngineSequence, Step
    from polydraft.sampling._sampler import RuleSampler

__all__ = ["AskedSequence"]


class AskedSequence:
    """A sequence of the engine as the loop uses it: every call is checked against the contract.

    Args:
        sequence: The engine's, empty.
        sampler: Chooses the tokens, and checks what for.
        vocab_size: Token ids lie below it.
        wants_logprobs: Whether every step must bring log-probabilities.
    """

    def __init__(
        self, sequence: EngineSequence, sampler: RuleSampler, vocab_size: int, *, wants_logprobs: bool
    ) -> None:
        self._sequence = sequence
        self._sampler = sampler
        self._asked = sampler.asked = Asked()
        self._vocab_size = vocab_size
        self._wants_logprobs = wants_logprobs
        self._stored = 0  # tokens that the sequence must store

    def prefill(self, token_ids: Sequence[int]) -> Step:
        """Run the prompt: a step with one chosen token."""
        size = len(token_ids)
        self._asked.ask("prefill", size, [token_ids[-1]])
        step: Step = checked_step(
            self._sequence.prefill(token_ids, self._sampler), "prefill", size, self._wants_logprobs
        )
        self._stored = size
        if self._sequence.length != size:
            raise defect(
                f"After a prefill of {size} ids, `length` is {self._sequence.length}: it counts the tokens that are "
                f"stored, here the prompt's {size}; the token that prefill chose is stored by the next verify."
            )
        return step

    def verify(self, token_ids: list[int]) -> Step:
        """Run the newest token and the drafts: a step with one chosen token for each."""
        rows, stored = len(token_ids), self._stored
        self._asked.ask("verify", stored + 1, token_ids)
        step: Step = checked_step(self._sequence.verify(token_ids, self._sampler), "verify", rows, self._wants_logprobs)
        self._stored += rows
        if self._sequence.length != stored + rows:
            raise defect(
                f"verify ran {rows} ids after {stored} stored ones, and `length` is then {self._sequence.length}, not "
                f"{stored + rows}: every id that is run is stored, the newest token and the drafts."
            )
        return step

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._sequence.rollback(length)
        self._stored = length
        if self._sequence.length != length:
            raise defect(
                f"After rollback({length}), `length` is {self._sequence.length}: its argument is the number of tokens "
                "to keep, not the number to forget."
            )

    def propose(self, newest: int, k: int) -> list[int]:
        """At most k drafts after the newest token."""
        self._asked.ask("propose", self._stored + 1, [newest])
        draft = checked_proposal(self._sequence.propose(newest, k, self._sampler), newest, k, self._vocab_size)
        if self._sequence.length != self._stored:
            raise defect(
                f"propose changed `length` from {self._stored} to {self._sequence.length}: drafts are stored when "
                "verify runs them, and not before."
            )
        return draft
