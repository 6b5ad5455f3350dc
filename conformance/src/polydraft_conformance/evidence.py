"""The greedy outputs of a case, plain and speculative: made once, judged by several checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.contract import GenerationStats

from polydraft_conformance.counting import count_log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import GenerationResult

    from polydraft_conformance.counting import SequenceLog
    from polydraft_conformance.prompts import WindowPrompt
    from polydraft_conformance.streams import Streamed

__all__ = ["Evidence", "GreedyRun", "LongRun", "Speculation", "greedy_settings", "speculation_of"]


@dataclass(frozen=True, slots=True)
class GreedyRun:
    """One prompt, decoded greedily, plainly and with speculation."""

    prompt: WindowPrompt
    plain: GenerationResult
    streamed: Streamed
    """The speculative run."""
    log: SequenceLog | None
    """The engine's calls in the speculative run; None for a whole engine."""

    @property
    def speculative(self) -> GenerationResult:
        """The speculative run's result."""
        return self.streamed.result

    @property
    def counts(self) -> GenerationStats | None:
        """The log, counted."""
        return count_log(self.log, len(self.speculative.token_ids)) if self.log else None


@dataclass(frozen=True, slots=True)
class LongRun:
    """One long output: a prompt of 60 tokens, continued to a context of 420 tokens, or as far as the context allows."""

    plain: GenerationResult
    streamed: Streamed
    """The speculative run."""
    log: SequenceLog | None
    """The engine's calls in the speculative run; None for a whole engine."""

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.plain.prompt_token_ids)

    @property
    def text(self) -> list[int]:
        """Prompt and speculative output."""
        return [*self.plain.prompt_token_ids, *self.streamed.token_ids]


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafted and accepted tokens of several generations."""

    stats: GenerationStats
    counted: bool
    """Counted by the suite at the engine; otherwise reported by the backend."""

    def as_numbers(self) -> dict[str, Any]:
        """JSON-ready. None: not reported."""
        positions = self.stats.accepted_per_position
        return {
            "rounds": self.stats.num_drafts,
            "drafted": self.stats.num_draft_tokens,
            "accepted": self.stats.num_accepted_tokens,
            "accepted_per_position": None if positions is None else list(positions),
            "counted": self.counted,
            "acceptance_rate": self.stats.acceptance_rate,
            "mean_acceptance_length": self.stats.mean_acceptance_length,
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """All greedy outputs of a case."""

    runs: tuple[GreedyRun, ...]
    repeated: GenerationResult
    """The plain output of the second prompt, made again in this session."""

    @property
    def speculation(self) -> Speculation:
        """The sum over all of them."""
        return speculation_of([(run.speculative, run.log) for run in self.runs])


def greedy_settings(max_new_tokens: int) -> dict[str, Any]:
    """Settings of greedy runs: EOS is ignored, so that outputs have just this length."""
    return {"max_new_tokens": max_new_tokens, "ignore_eos": True, "temperature": 0.0}


def speculation_of(runs: Sequence[tuple[GenerationResult, SequenceLog | None]]) -> Speculation:
    """Sum up what speculation did: from the engine's logs where there are any, else from the statistics."""
    counts = [count_log(log, len(result.token_ids)) for result, log in runs if log is not None]
    # All or none: one rate must not mix the suite's counts with the backend's.
    counted = len(counts) == len(runs)
    return Speculation(GenerationStats.total(counts if counted else (result.stats for result, _ in runs)), counted)
