"""Records of a verification, as stored and printed."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from polydraft.contract.records import Exactness, Record
from polydraft.contract.results import GenerationStats
from polydraft.verification._verdict import VERDICTS, Judgement, Verdict

__all__ = ["FORMAT", "CheckedCase", "Subject", "Verification"]

FORMAT = 1
"""Version of the kept files; files of other versions are not read."""


class Subject(Record):
    """What a verdict holds for. A verification counts for a session only if all of this is the same."""

    target: str
    target_fingerprint: str
    drafter: str | None
    drafter_fingerprint: str | None
    method: str
    num_speculative_tokens: int
    exactness: Exactness
    backend: str
    versions: dict[str, str] = Field(
        description="Of polydraft, the engine, its plugin, and the distributions that the plugin requires."
    )
    engine_options: dict[str, Any]
    hardware: str
    dtype: str = Field(default="", description="As loaded; empty before loading.")
    device: str = Field(default="", description="As loaded; empty before loading.")


class CheckedCase(Record):
    """One prompt, decoded plainly and with speculation."""

    prompt: str = Field(description="Which prompt it is, in words.")
    num_prompt_tokens: int
    sampling: dict[str, Any] = Field(description="Sampling settings, the seed among them; empty: greedy.")
    num_tokens: int = Field(description="Tokens compared.")
    judgement: Judgement


class Verification(Record):
    """Everything that one run of ``polydraft verify`` found."""

    format: int = FORMAT
    subject: Subject
    created: str = Field(description="When, in UTC (ISO 8601).")
    seconds: float = Field(description="How long the check took, loading not counted.")
    cases: tuple[CheckedCase, ...]
    stats: GenerationStats = Field(description="What speculation did, over all cases; None: not reported.")
    plain_tokens_per_second: float | None = Field(description="Over the greedy cases, prefill not counted.")
    speculative_tokens_per_second: float | None = Field(description="Over the same cases.")
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst of all cases."""
        return next(verdict for verdict in reversed(VERDICTS) if self.count(verdict))

    @property
    def passes(self) -> bool:
        """Whether speculation kept its promise: no difference but near ties."""
        return self.verdict != "DIVERGED"

    @property
    def num_tokens(self) -> int:
        """Tokens compared."""
        return sum(case.num_tokens for case in self.cases)

    @property
    def speed_up(self) -> float | None:
        """Tokens/s with speculation over those of plain decoding."""
        if not self.plain_tokens_per_second or not self.speculative_tokens_per_second:
            return None
        return self.speculative_tokens_per_second / self.plain_tokens_per_second

    def count(self, verdict: Verdict) -> int:
        """Cases with this verdict."""
        return sum(case.judgement.verdict == verdict for case in self.cases)
