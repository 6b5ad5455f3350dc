"""Counts of one generation, taken from its rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract.results import GenerationStats

if TYPE_CHECKING:
    from polydraft.contract.results import Round

__all__ = ["RoundCounts"]


class RoundCounts:
    """Adds up rounds. An engine that reports statistics of its own puts them into ``reported``."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_rounds = 0
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.accepted_per_position: list[int] = []
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.reported: GenerationStats | None = None
        self._known = True

    def add(self, emitted: Round, seconds: float) -> None:
        """Count one round that took ``seconds`` of the engine's time; the first one is prefill."""
        if self.num_rounds == 0:
            self.prefill_seconds = seconds
        else:
            self.decode_seconds += seconds
        self.num_rounds += 1
        self.num_tokens += len(emitted.token_ids)
        if emitted.num_draft_tokens is None or emitted.num_accepted_tokens is None:
            self._known = False
            return
        if emitted.num_draft_tokens:
            self.num_drafts += 1
            self.num_draft_tokens += emitted.num_draft_tokens
            self.num_accepted_tokens += emitted.num_accepted_tokens
            missing = emitted.num_draft_tokens - len(self.accepted_per_position)
            self.accepted_per_position.extend([0] * missing)
            for position in range(emitted.num_accepted_tokens):
                self.accepted_per_position[position] += 1

    def stats(self) -> GenerationStats:
        """The finished statistics."""
        if self.reported is not None:
            return self.reported
        if not self._known:
            return GenerationStats(
                num_tokens=self.num_tokens, prefill_seconds=self.prefill_seconds, decode_seconds=self.decode_seconds
            )
        return GenerationStats(
            num_tokens=self.num_tokens,
            num_target_steps=max(self.num_rounds - 1, 0),
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            accepted_per_position=tuple(self.accepted_per_position),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
        )
