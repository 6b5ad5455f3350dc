"""What the loop asks of a sequence, and the checks that the sequence did just that.

An engine that chooses for other ids or positions than it was given writes text that looks right: the loop compares what
reaches the sampler, and ``length``, with what it has asked for. That costs about a microsecond in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft._loop.returned import checked_proposal, checked_step, defect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract.results import TokenLogprobs
    from polydraft.contract.stepping import EngineSequence, Sampler, Step

__all__ = ["AskedSequence"]


class AskedSequence:
    """A sequence of the engine as the loop uses it: every call is checked against the contract.

    Args:
        sequence: The engine's, empty.
        sampler: Chooses the tokens; the engine gets it behind a check of what it chooses for.
        vocab_size: Token ids lie below it.
        wants_logprobs: Whether every step must bring log-probabilities.
    """

    def __init__(self, sequence: EngineSequence, sampler: Sampler, vocab_size: int, *, wants_logprobs: bool) -> None:
        self._sequence = sequence
        self._sampler = _AskedSampler(sampler)
        self._vocab_size = vocab_size
        self._wants_logprobs = wants_logprobs
        self._stored = 0  # tokens that the sequence must store

    def prefill(self, token_ids: Sequence[int]) -> Step:
        """Run the prompt: a step with one chosen token."""
        size = len(token_ids)
        self._sampler.ask("prefill", size, [token_ids[-1]])
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
        self._sampler.ask("verify", stored + 1, token_ids)
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
        self._sampler.ask("propose", self._stored + 1, [newest])
        draft = checked_proposal(self._sequence.propose(newest, k, self._sampler), newest, k, self._vocab_size)
        if self._sequence.length != self._stored:
            raise defect(
                f"propose changed `length` from {self._stored} to {self._sequence.length}: drafts are stored when "
                "verify runs them, and not before."
            )
        return draft


class _AskedSampler:
    """The sampler as the engine gets it: only what was asked for is chosen."""

    def __init__(self, sampler: Sampler) -> None:
        self.needs_prefix = sampler.needs_prefix
        self._sampler = sampler
        self._method = ""
        self._first = 0  # position that the first row chooses, and the first draft has
        self._chooses: int | None = None  # the same; None while drafting
        self._run: list[int] = []
        self._drafts_to = 0  # the next position that may be drafted

    def ask(self, method: str, first_position: int, token_ids: list[int]) -> None:
        """Before a call of the engine's: what it has to choose for."""
        self._method, self._run = method, token_ids
        self._first = self._drafts_to = first_position
        self._chooses = None if method == "propose" else first_position

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """As the sampler, for the ids and positions that were asked for."""
        # Not only ``!=``: that of an array is an array.
        if first_position != self._chooses or type(run_token_ids) is not list or run_token_ids != self._run:
            self._check_choice(logits, first_position, run_token_ids)
        return self._sampler.choose(logits, first_position, self._run, keep_logprobs=keep_logprobs)

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """As the sampler, for the positions after the newest token, one after the other."""
        if not self._first <= position <= self._drafts_to:
            raise defect(
                f"`choose_draft` was given the position {position}: the first draft of this round has the position "
                f"{self._first}, `length` + 1, and each further one the next."
            )
        if position == self._drafts_to:
            self._drafts_to = position + 1
        if self.needs_prefix and run_token_ids is not None:
            self._check_prefix(position, run_token_ids)
        return self._sampler.choose_draft(logits, position, run_token_ids)

    def _check_choice(self, logits: Any, first_position: Any, run_token_ids: Any) -> None:
        """Raise unless ids of another type than a list are equal all the same."""
        asked, method = self._run, self._method
        if method == "propose":
            raise defect("propose called `choose`, which chooses the target's tokens: drafts are for `choose_draft`.")
        given = _ids(run_token_ids)
        if given != asked and method == "verify":
            raise defect(
                f"verify was given the ids {asked} but chose for {given}: `run_token_ids` of `sampler.choose` are the "
                "ids of all rows, the newest token and every draft, not the last one alone."
            )
        if given != asked:
            raise defect(
                f"prefill chose for {len(given)} ids: it chooses one token, from the row of the prompt's last id: "
                f"`sampler.choose(logits[-1:], len(token_ids), token_ids[-1:])`, with logits of shape (rows, vocab)."
            )
        if first_position != self._first:
            after = "`length` before the step, plus 1" if method == "verify" else "the number of the prompt's ids"
            raise defect(
                f"{method} chose from position {first_position} on, not {self._first}: `first_position` of "
                f"`sampler.choose` is one past the position of the id that row 0 ran ({after})."
            )

    def _check_prefix(self, position: int, run_token_ids: Sequence[int]) -> None:
        wanted = position - self._first + 1
        if len(run_token_ids) != wanted or run_token_ids[0] != self._run[0]:
            raise defect(
                f"`choose_draft` for draft {wanted} of a round was given the ids {_ids(run_token_ids)}: "
                f"`run_token_ids` are the newest token, {self._run[0]}, and the drafts of the round so far, "
                f"{wanted} in all."
            )


def _ids(given: Any) -> list[Any]:
    """Ids of any integer type, as Python's where they are."""
    try:
        return [int(token_id) for token_id in given]
    except (TypeError, ValueError):
        return [given]
