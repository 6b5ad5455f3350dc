"""The check itself: the same prompts decoded plainly and with speculation, judged, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from polydraft.contract.results import GenerationStats
from polydraft.errors import EngineError, InvalidRequestError, SpeculationUnavailableError
from polydraft.verification._measure import measure, repeats_seeds
from polydraft.verification._plan import PlannedCase, planned_cases
from polydraft.verification._records import CheckedCase, Subject, Verification
from polydraft.verification._verdict import Judgement, judge

if TYPE_CHECKING:
    from polydraft._session.session import Session
    from polydraft.contract.records import Capabilities
    from polydraft.contract.results import GenerationResult

__all__ = ["DEFAULT_SECONDS", "check_session"]

DEFAULT_SECONDS = 60.0
"""Where no time is given, one pass over the prompts, for at most so long."""

_NEW_TOKENS, _FEWEST, _WARM_UP = 64, 12, 8
_SHARE = 0.1
"""Share of the time that one case may take: outputs are shorter on a slow machine."""
_FEW = 200
"""Fewer tokens than that say little."""
_DEFECTS = 3
"""So many differences that are no near ties are enough."""


@dataclass
class _Sums:
    """Counts over all cases, and the speeds of the greedy ones."""

    tokens: int = 0
    counts: dict[str, int | None] = field(default_factory=dict)
    per_position: list[int] | None = field(default_factory=list)
    timed: dict[str, list[float | None]] = field(default_factory=lambda: {"plain": [], "speculative": []})
    timed_tokens: dict[str, int] = field(default_factory=lambda: {"plain": 0, "speculative": 0})

    def add(self, plain: GenerationResult, speculative: GenerationResult, *, greedy: bool) -> None:
        stats = speculative.stats
        self.tokens += stats.num_tokens
        for name in ("num_target_steps", "num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            old, new = self.counts.get(name, 0), getattr(stats, name)
            self.counts[name] = None if old is None or new is None else old + new
        if self.per_position is None or stats.accepted_per_position is None:
            self.per_position = None
        else:
            missing = len(stats.accepted_per_position) - len(self.per_position)
            self.per_position += [0] * missing
            for position, count in enumerate(stats.accepted_per_position):
                self.per_position[position] += count
        if greedy:
            for name, result in (("plain", plain), ("speculative", speculative)):
                self.timed[name].append(result.stats.decode_seconds)
                self.timed_tokens[name] += result.stats.num_tokens - 1

    def stats(self) -> GenerationStats:
        positions = None if self.per_position is None else tuple(self.per_position)
        return GenerationStats(num_tokens=self.tokens, accepted_per_position=positions, **self.counts)

    def tokens_per_second(self, name: str) -> float | None:
        seconds = [value for value in self.timed[name] if value]
        return self.timed_tokens[name] / sum(seconds) if seconds and len(seconds) == len(self.timed[name]) else None


def check_session(
    session: Session,
    subject: Subject,
    capabilities: Capabilities,
    window: int | None,
    *,
    time_limit: float | None = None,
    progress: Callable[[CheckedCase], None] | None = None,
) -> Verification:
    """Verify a loaded session.

    Args:
        session: A session that speculates. Nobody else may use it meanwhile, or the times mean nothing.
        subject: What it runs.
        capabilities: Its backend's.
        window: The target's sliding window, in tokens; None: it has none, or it is not known.
        time_limit: Seconds that the check may take; it goes on until then. None: one pass over the prompts, at most a
            minute. A case under way is cut at the limit, and what there is of it is compared.
        progress: Told each case as it is done.

    Raises:
        SpeculationUnavailableError: Speculation is off, or the drafter drafted nothing: nothing was verified.
        InvalidRequestError: The time was too short for a single case.
        EngineError: The engine failed.
    """
    running = session.running
    if running.method is None or running.num_speculative_tokens == 0:
        why = running.speculation_off.message if running.speculation_off else "No drafter is loaded."
        raise SpeculationUnavailableError(f"There is nothing to verify, speculation is off: {why}", "Give a drafter.")
    seeds = repeats_seeds(capabilities)
    begin = time.monotonic()
    limit = DEFAULT_SECONDS if time_limit is None else time_limit
    check = _Check(session, capabilities, begin + limit)
    notes = []
    skipped: set[str] = set()
    for number, planned in planned_cases(session.tokenizer, window, running.context_length, seeds=seeds):
        if time.monotonic() >= check.deadline or (number > 0 and time_limit is None) or check.defects >= _DEFECTS:
            break
        if number > 0 and planned.prompt in skipped:
            continue
        if not check.has_time_for(planned):
            skipped.add(planned.prompt)
            if len(skipped) == len({case.prompt for case in check.cases} | skipped):
                break  # not even the shortest prompt
            continue
        if planned.sampling and check.conflict:
            continue
        case = check.run(planned, limit)
        if case is not None and progress is not None:
            progress(case)
    if not check.cases:
        raise InvalidRequestError(
            f"{limit:g} seconds are too few to decode a single prompt both ways.",
            "Give a larger `time_limit`.",
            argument="time_limit",
        )
    stats = check.sums.stats()
    if stats.num_draft_tokens == 0:
        raise SpeculationUnavailableError(
            f"No draft was made in {stats.num_tokens} tokens, so nothing could be verified.",
            "Give more time, or another drafter.",
        )
    if check.conflict:
        notes.append(f"Greedy outputs only: {check.conflict}")
    elif not seeds:
        notes.append(f"Greedy outputs only: the backend {running.backend} does not claim that seeds repeat.")
    notes += [
        f"There was no time for a prompt of this kind: {name}. A longer --time-limit includes it."
        for name in sorted(skipped - {case.prompt for case in check.cases})
    ]
    if (compared := sum(case.num_tokens for case in check.cases)) < _FEW:
        notes.append(f"Only {compared} tokens were compared: a longer --time-limit says more.")
    if running.exactness == "bitwise":
        notes.append("Plain decoding ran in steps of the same fixed shape; ordinary plain decoding may be faster.")
    return Verification(
        subject=subject,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - begin, 2),
        cases=tuple(check.cases),
        stats=stats,
        plain_tokens_per_second=check.sums.tokens_per_second("plain"),
        speculative_tokens_per_second=check.sums.tokens_per_second("speculative"),
        notes=tuple(notes),
    )


class _Check:
    """A check under way."""

    def __init__(self, session: Session, capabilities: Capabilities, deadline: float) -> None:
        self.session = session
        self.capabilities = capabilities
        self.deadline = deadline
        self.cases: list[CheckedCase] = []
        self.sums = _Sums()
        self.defects = 0
        self.conflict = ""
        """Why sampling cannot be combined with speculation here, if it cannot."""
        self._new_tokens = 0
        self._prefill_rate = 0.0
        """Seconds a prompt token took, at worst."""

    def has_time_for(self, planned: PlannedCase) -> bool:
        """Whether both prefills of a case fit into the time that is left, as far as can be told."""
        left = self.deadline - time.monotonic()
        return 2 * self._prefill_rate * len(planned.token_ids) < left

    def run(self, planned: PlannedCase, limit: float) -> CheckedCase | None:
        """Decode both ways, in turn plain first and last; None where the time ended before there was anything."""
        if not self._new_tokens:
            self._new_tokens = self._warm_up(planned, limit)
        ways = ["off", "on"] if len(self.cases) % 2 == 0 else ["on", "off"]
        results: dict[str, GenerationResult] = {}
        for way in ways:
            # The half of what is left: the second way needs as long as the first.
            share = (self.deadline - time.monotonic()) / (2 - len(results))
            try:
                found = self._generate(planned, way, self._new_tokens, time.monotonic() + share)
            except SpeculationUnavailableError as error:
                if not planned.sampling:
                    raise
                self.conflict = error.message
                return None
            if found is None:
                return None
            results[way] = found
        plain, speculative = results["off"], results["on"]
        cut = min(len(plain.token_ids), len(speculative.token_ids))
        ended = "cancelled" in (plain.finish_reason, speculative.finish_reason)
        expected, other = (result.token_ids[: cut if ended else None] for result in (plain, speculative))
        if ended and cut < 3:  # the first token is the prefill's: no round has been compared
            return None
        judgement = judge(
            expected, other, lambda at: measure(self.session, self.capabilities, plain, expected, other, at)
        )
        self.defects += judgement.verdict == "DIVERGED"
        self.sums.add(plain, speculative, greedy=not planned.sampling)
        return self._keep(planned, min(len(expected), len(other)), judgement)

    def _keep(self, planned: PlannedCase, num_tokens: int, judgement: Judgement) -> CheckedCase:
        case = CheckedCase(
            prompt=planned.prompt,
            num_prompt_tokens=len(planned.token_ids),
            sampling=planned.sampling,
            num_tokens=num_tokens,
            judgement=judgement,
        )
        self.cases.append(case)
        return case

    def _warm_up(self, planned: PlannedCase, limit: float) -> int:
        """A few tokens both ways, as an engine does some things once. Returns how many tokens a case may have."""
        seconds = 0.0
        for way in ("off", "on"):
            found = self._generate(planned, way, _WARM_UP, self.deadline)
            if found is not None:
                seconds += (found.stats.decode_seconds or 0.0) / max(1, found.stats.num_tokens - 1)
        room = self.session.running.context_length - len(planned.token_ids)
        wanted = int(limit * _SHARE / seconds) if seconds else _NEW_TOKENS
        return min(max(_FEWEST, wanted), _NEW_TOKENS, room)

    def _generate(
        self, planned: PlannedCase, speculate: Any, max_new_tokens: int, deadline: float
    ) -> GenerationResult | None:
        """Decode until the deadline; None where it is past before the first token."""
        stream = self.session.stream(
            list(planned.token_ids),
            max_new_tokens=max_new_tokens,
            ignore_eos=True,
            speculate=speculate,
            **planned.sampling,
        )
        for _ in stream:
            if time.monotonic() >= deadline:
                stream.cancel()
        result = stream.result
        if result is None:
            raise EngineError("The session ended a stream without a result.", "Tell the plugin's author.")
        seconds = result.stats.prefill_seconds or 0.0
        self._prefill_rate = max(self._prefill_rate * 0.9, seconds / len(planned.token_ids))
        return result if result.token_ids else None
