"""Records of a verification, as stored and printed."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from polydraft.contract.records import Exactness, Record
from polydraft.contract.results import GenerationStats
from polydraft.verification._verdict import VERDICTS, Judgement, Verdict

__all__ = ["FORMAT", "CheckedCase", "Subject", "Verification"]

FORMAT = 2
"""Version of the kept files; files of other versions are not read."""


class Subject(Record):
    """What a verdict holds for. A verification counts for a session only if all of this is the same.

    Not how models are called: the same bytes elsewhere are the same model.
    """

    target: str = Field(description="Name for sentences: Hub id, ``builtin:<name>``, or the absolute path.")
    target_fingerprint: str = Field(description="Of all bytes; empty: not known before it is downloaded.")
    target_commit: str = Field(description="Of a Hub model, as the cache knows it; empty otherwise.")
    drafter: str | None
    drafter_fingerprint: str | None
    drafter_commit: str
    method: str
    num_speculative_tokens: int
    max_speculative_tokens: int | None = Field(default=None, description="Where k is picked for each round.")
    exactness: Exactness
    backend: str
    versions: dict[str, str] = Field(
        description="Of polydraft, the engine, its plugin, and the distributions that the plugin requires."
    )
    builds: dict[str, str] | None = Field(
        description="Of the engine, the distributions, polydraft's and the plugin's code; None: it cannot be known."
    )
    trust_remote_code: bool
    engine_options: dict[str, Any]
    hardware: str
    dtype: str = Field(default="", description="As loaded; empty before loading.")
    device: str = Field(default="", description="As loaded; empty before loading.")

    @property
    def unknown(self) -> str:
        """Why no verification can be kept or found for it, one sentence; empty if one can."""
        if self.builds is None:
            return f"What {self.backend} runs was started elsewhere and cannot be identified from here."
        missing = [
            name
            for name, fingerprint in ((self.target, self.target_fingerprint), (self.drafter, self.drafter_fingerprint))
            if fingerprint == ""
        ]
        return f"The weights of {' and '.join(map(str, missing))} are not on this machine." if missing else ""


class CheckedCase(Record):
    """One prompt, decoded plainly and with speculation."""

    prompt: str = Field(description="Which prompt it is, in words.")
    num_prompt_tokens: int = Field(description="In the unit of ``judgement``.")
    sampling: dict[str, Any] = Field(description="Sampling settings, the seed among them; empty: greedy.")
    num_tokens: int = Field(description="Tokens compared; characters where that is the unit of ``judgement``.")
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
        """Whether speculation kept its promise: tokens were compared, with no difference but near ties."""
        return self.verdict != "DIVERGED" and self.compares

    @property
    def compares(self) -> bool:
        """Whether a token was compared that speculation had to do with: the first of an output is the prefill's."""
        return any(case.num_tokens > 1 for case in self.cases) and self.stats.num_draft_tokens != 0

    @property
    def sound(self) -> bool:
        """Whether it says what a check can have found: each verdict follows from the evidence next to it."""
        ties = self.subject.exactness != "bitwise"
        return bool(self.cases) and all(
            case.num_tokens >= 0
            and case.judgement.follows
            and (ties or case.judgement.verdict != "NEAR_TIE")
            and (case.judgement.position is None or case.judgement.position <= case.num_tokens)
            for case in self.cases
        )

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
