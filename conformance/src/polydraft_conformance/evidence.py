"""The greedy outputs of a case, plain and speculative: made once, judged by several checks.

The plain outputs of a target are made in the first session of that target, and count for every drafter and k.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from polydraft_conformance.counting import Counts, count_log, logged
from polydraft_conformance.prompts import window_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft import Session
    from polydraft.contract import GenerationResult

    from polydraft_conformance.counting import SequenceLog
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.prompts import WindowPrompt
    from polydraft_conformance.suite import Suite

__all__ = ["Evidence", "Speculation", "evidence", "greedy_settings", "plain_result", "speculation_of"]


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt, decoded plainly and with speculation."""

    prompt: WindowPrompt
    plain: GenerationResult
    speculative: GenerationResult
    log: SequenceLog | None
    """What the engine did in the speculative run; None for a whole engine."""

    @property
    def counts(self) -> Counts | None:
        """The log, counted."""
        return count_log(self.log, len(self.speculative.token_ids)) if self.log else None


@dataclass(frozen=True, slots=True)
class Speculation:
    """What speculation did in several generations. None: neither counted nor reported."""

    rounds: int | None
    drafted: int | None
    accepted: int | None
    counted: bool
    """Counted by the suite at the engine; else reported by the backend."""
    per_position: tuple[int, ...] | None = None
    """Element i: rounds in which draft i was accepted."""

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted and self.accepted is not None else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """1 + accepted / rounds."""
        return 1 + self.accepted / self.rounds if self.rounds and self.accepted is not None else None

    def as_numbers(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "accepted_per_position": None if self.per_position is None else list(self.per_position),
            "counted": self.counted,
            "acceptance_rate": self.acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """All greedy generations of a case."""

    case: Case
    generations: tuple[Generation, ...]
    repeated: GenerationResult
    """The plain output of the second prompt, made again in this session."""

    @property
    def speculation(self) -> Speculation:
        """What speculation did in all of them."""
        return speculation_of([(generation.speculative, generation.log) for generation in self.generations])


def greedy_settings(max_new_tokens: int) -> dict[str, Any]:
    """Settings of the greedy runs: EOS is ignored, so that outputs are as long as was asked for."""
    return {"max_new_tokens": max_new_tokens, "ignore_eos": True, "temperature": 0.0}


def plain_result(
    suite: Suite, session: Session, case: Case, token_ids: Sequence[int], settings: dict[str, Any]
) -> GenerationResult:
    """Plain decoding of a prompt, made once for a target: it depends on neither drafter nor k."""
    key = ("plain", case.pair.target, tuple(token_ids), tuple(sorted(settings.items())))
    if key not in suite.cache:
        suite.cache[key] = session.generate(list(token_ids), speculate="off", **settings)
    result: GenerationResult = suite.cache[key]
    return result


def evidence(suite: Suite, case: Case) -> Evidence:
    """The evidence of a case; what made it fail the first time is raised again.

    Raises:
        BaseException: Whatever loading or generating raised, the time limit included.
    """
    key = ("evidence", case)
    if key not in suite.cache:
        try:
            suite.cache[key] = _make(suite, case)
        except BaseException as error:
            suite.cache[key] = error
            raise
    found = suite.cache[key]
    if isinstance(found, BaseException):
        raise found
    made: Evidence = found
    return made


def speculation_of(runs: Sequence[tuple[GenerationResult, SequenceLog | None]]) -> Speculation:
    """Sum up what speculation did: from the engine's logs where there are any, else from the statistics."""
    if all(log is not None for _, log in runs):
        counts = [count_log(log, len(result.token_ids)) for result, log in runs if log is not None]
        return Speculation(
            rounds=sum(count.rounds for count in counts),
            drafted=sum(count.drafted for count in counts),
            accepted=sum(count.accepted for count in counts),
            counted=True,
            per_position=_add([count.per_position for count in counts]),
        )
    stats = [result.stats for result, _ in runs]
    return Speculation(
        rounds=_sum(stat.num_drafts for stat in stats),
        drafted=_sum(stat.num_draft_tokens for stat in stats),
        accepted=_sum(stat.num_accepted_tokens for stat in stats),
        counted=False,
        per_position=_add([stat.accepted_per_position for stat in stats]),
    )


def _make(suite: Suite, case: Case) -> Evidence:
    session = suite.session(case)
    generations = []
    for prompt in window_prompts(suite, session, case):
        settings = greedy_settings(prompt.max_new_tokens)
        plain = plain_result(suite, session, case, prompt.token_ids, settings)
        with logged(session) as logs:
            speculative = session.generate(list(prompt.token_ids), **settings)
        generations.append(Generation(prompt, plain, speculative, logs[-1] if logs else None))
    second = generations[1].prompt
    repeated = session.generate(list(second.token_ids), speculate="off", **greedy_settings(second.max_new_tokens))
    return Evidence(case, tuple(generations), repeated)


def _add(rows: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Sums by position; None if one row is."""
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    return tuple(sum(column) for column in zip_longest(*known, fillvalue=0))


def _sum(values: Any) -> int | None:
    """The sum; None if one value is."""
    every = list(values)
    return None if any(value is None for value in every) else sum(every)
