"""The check itself: the same prompts decoded plainly and with speculation, judged, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from polydraft.contract.requests import DEFAULT_SETTINGS
from polydraft.contract.results import GenerationStats, compared
from polydraft.contract.whole import WholeEngine
from polydraft.errors import ContextLengthError, EngineError, InvalidRequestError, SpeculationUnavailableError
from polydraft.text._prompts import encode_prompt
from polydraft.verification._measure import judge_outputs, repeats_seeds
from polydraft.verification._plan import PlannedCase, own_cases, planned_cases
from polydraft.verification._records import CheckedCase, Subject, Verification

if TYPE_CHECKING:
    from polydraft._session.session import Session
    from polydraft.contract.records import Capabilities
    from polydraft.contract.requests import Prompt
    from polydraft.contract.results import GenerationResult

__all__ = ["DEFAULT_SECONDS", "check_session"]

DEFAULT_SECONDS = 60.0
"""Where no time is given: one pass over the prompts, for at most this long."""

_NEW_TOKENS, _FEWEST, _WARM_UP = 64, 12, 8
_SHARE = 0.1
"""Share of the time that one case may take: outputs are shorter on a slow machine."""
_WARM_UP_SHARE = 0.02
"""Share of the time that decoding a prompt untimed may take: on a slow machine one-time work counts for little."""
_FEW = 200
"""With fewer tokens compared, a note says that the result is weak."""
_DEFECTS = 3
"""After this many defects the check ends."""


def check_session(
    session: Session,
    subject: Subject,
    capabilities: Capabilities,
    window: int | None,
    *,
    time_limit: float | None = None,
    progress: Callable[[CheckedCase], None] | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> Verification:
    """Verify a loaded session.

    Args:
        session: A session that speculates. Other calls on it at the same time would spoil the measured speeds.
        subject: What it runs.
        capabilities: Its backend's.
        window: The target's sliding window, in tokens; None: it has none, or it is not known.
        time_limit: Seconds that the check takes: it repeats the prompts until then. None: one pass over the prompts, at
            most a minute. A case in progress is cut at the limit, and compared as far as it got.
        progress: Called with each finished case.
        prompts: The caller's own prompts, as ``Session.generate`` takes them; None: built-in ones.

    Raises:
        SpeculationUnavailableError: Speculation is off, or the drafter drafted nothing: nothing was verified.
        InvalidRequestError: The time was too short for a single case.
        EngineError: The engine failed, or its outputs are those of logits that are not finite.
    """
    running = session.running
    if running.method is None or running.num_speculative_tokens == 0:
        why = running.speculation_off.message if running.speculation_off else "No drafter is loaded."
        raise SpeculationUnavailableError(f"There is nothing to verify, speculation is off: {why}", "Give a drafter.")
    seeds = repeats_seeds(capabilities)
    started = time.monotonic()
    limit = DEFAULT_SECONDS if time_limit is None else time_limit
    check = _Check(session, capabilities, started + limit)
    notes = []
    skipped: set[str] = set()
    if prompts is None:
        cases = planned_cases(session.tokenizer, window, running.context_length, seeds=seeds)
    else:
        cases = own_cases(_encoded(prompts, session), seeds=seeds)
    for number, planned in cases:
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
    if isinstance(session.engine, WholeEngine) and not check.evidence and len(check.tokens) == 1:
        raise EngineError(
            f"Every output is the token {check.tokens.pop()} over and over, as where logits are not finite, and this "
            "backend reports no log-probabilities.",
            "Download the weights again, or use another dtype.",
        )
    stats = GenerationStats.total(check.speculative)
    if not any(case.num_tokens > 1 for case in check.cases) and not check.defects:
        raise SpeculationUnavailableError(
            "Every output ended after its first token, which is the prefill's, so nothing could be verified.",
            "Give a longer `context_length`, or more time.",
        )
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
        f"There was no time for a prompt of this kind: {name}. A longer `time_limit` includes it."
        for name in sorted(skipped - {case.prompt for case in check.cases})
    ]
    if (tokens := sum(case.num_tokens for case in check.cases)) < _FEW:
        unit = check.cases[0].judgement.unit
        notes.append(f"Only {tokens} {unit}s were compared: a longer `time_limit` says more.")
    if check.evidence:
        notes.append("Every token's log-probability was asked for, to see that it is finite; speeds include that.")
    if running.exactness == "bitwise":
        notes.append("Plain decoding ran in steps of the same fixed shape; ordinary plain decoding may be faster.")
    return Verification(
        subject=subject,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 2),
        cases=tuple(check.cases),
        stats=stats,
        plain_tokens_per_second=_tokens_per_second(check.greedy["off"]),
        speculative_tokens_per_second=_tokens_per_second(check.greedy["on"]),
        notes=tuple(notes),
    )


def _encoded(prompts: Sequence[Prompt], session: Session) -> list[tuple[str, tuple[int, ...]]]:
    """What each of the caller's prompts is called, and its token ids."""
    tokenizer, most = session.tokenizer, session.running.context_length - _FEWEST
    found = []
    for number, prompt in enumerate(prompts, 1):
        token_ids = encode_prompt(prompt, tokenizer, vocab_size=tokenizer.vocab_size).token_ids
        if len(token_ids) > most:
            raise ContextLengthError(
                f"Prompt {number} has {len(token_ids)} tokens, and the context has {session.running.context_length}.",
                "Give a shorter prompt, or a longer `context_length`.",
            )
        found.append((f"prompt {number}", token_ids))
    return found


def _tokens_per_second(stats: list[GenerationStats]) -> float | None:
    """Over several generations; the first token of each is prefill's."""
    seconds = [one.decode_seconds for one in stats if one.decode_seconds]
    return sum(one.num_tokens - 1 for one in stats) / sum(seconds) if seconds and len(seconds) == len(stats) else None


class _Check:
    """A check in progress."""

    def __init__(self, session: Session, capabilities: Capabilities, deadline: float) -> None:
        self.session = session
        self.capabilities = capabilities
        self.deadline = deadline
        self.cases: list[CheckedCase] = []
        self.speculative: list[GenerationStats] = []
        """Of every case."""
        self.greedy: dict[str, list[GenerationStats]] = {"off": [], "on": []}
        """Of the greedy cases, by ``speculate``: for the speeds."""
        self.defects = 0
        self.tokens: set[int] = set()
        """All tokens of the plain outputs."""
        # A whole engine shows only by log-probabilities that its logits are finite: the session then refuses others. A
        # stepping engine's logits are looked at by the core. Some engines do not draft where they are asked for them.
        self.evidence: dict[str, Any] = {}
        if isinstance(session.engine, WholeEngine) and "logprobs" in capabilities.sampling:
            asked = DEFAULT_SETTINGS.model_copy(update={"logprobs": 0})
            self.evidence = {} if session.engine.speculation_conflict(asked) else {"logprobs": 0}
        self.conflict = ""
        """Why sampling cannot be combined with speculation here, if it cannot."""
        self._new_tokens = 0
        self._token_rate = 0.0
        """Seconds per token, summed over both ways: a case decodes each token twice."""
        self._warm: set[str] = set()
        """Prompts that have been decoded untimed."""
        self._prefill_rate = 0.0
        """Seconds per prompt token, at worst."""

    def has_time_for(self, planned: PlannedCase) -> bool:
        """Whether both prefills of a case are expected to fit into the time that is left."""
        left = self.deadline - time.monotonic()
        return 2 * self._prefill_rate * len(planned.token_ids) < left

    def run(self, planned: PlannedCase, limit: float) -> CheckedCase | None:
        """Decode both ways, alternating which comes first; None where time ran out before there was anything."""
        if not self._new_tokens:
            self._new_tokens = self._first_tokens(planned, limit)
        # On a CPU nothing is compiled for single lengths.
        if not planned.sampling and self.session.running.device != "cpu":
            self._warm_up(planned, limit)
        ways = ["off", "on"] if len(self.cases) % 2 == 0 else ["on", "off"]
        results: dict[str, GenerationResult] = {}
        rounds: list[int] = []
        for way in ways:
            # Half of what is left: the second way takes as long as the first.
            share = (self.deadline - time.monotonic()) / (2 - len(results))
            try:
                found = self._generate(planned, way, self._new_tokens, time.monotonic() + share, rounds)
            except SpeculationUnavailableError as error:
                if not planned.sampling:
                    raise
                self.conflict = error.message
                return None
            if found is None:
                return None
            results[way] = found
        plain, speculative = results["off"], results["on"]
        expected, other = compared(plain, speculative)
        ended = "cancelled" in (plain.finish_reason, speculative.finish_reason)
        if ended and len(expected) < 3:  # the first token is the prefill's: no round has been compared
            return None
        judgement = judge_outputs(
            self.session, self.capabilities, plain.prompt_token_ids, plain.settings, expected, other, rounds=rounds
        )
        self.defects += judgement.verdict == "DIVERGED"
        self.tokens.update(expected)
        self.speculative.append(speculative.stats)
        if not planned.sampling:
            for way, result in results.items():
                self.greedy[way].append(result.stats)
        case = CheckedCase(
            prompt=planned.prompt,
            num_prompt_tokens=len(planned.token_ids),
            sampling=planned.sampling,
            num_tokens=min(len(expected), len(other)),
            judgement=judgement,
        )
        self.cases.append(case)
        return case

    def _first_tokens(self, planned: PlannedCase, limit: float) -> int:
        """A few tokens both ways, and again without one-time work. Returns how many tokens a case may have."""
        for _ in range(2):
            self._token_rate = 0.0
            for way in ("off", "on"):
                found = self._generate(planned, way, _WARM_UP, self.deadline)
                if found is not None:
                    self._token_rate += (found.stats.decode_seconds or 0.0) / max(1, found.stats.num_tokens - 1)
        room = self.session.running.context_length - len(planned.token_ids)
        wanted = int(limit * _SHARE / self._token_rate) if self._token_rate else _NEW_TOKENS
        return min(max(_FEWEST, wanted), _NEW_TOKENS, room)

    def _warm_up(self, planned: PlannedCase, limit: float) -> None:
        """Decode a prompt untimed that has not been timed yet: some engines compile kernels for each length."""
        length = len(planned.token_ids)
        cost = 2 * self._prefill_rate * length + self._token_rate * self._new_tokens
        if planned.prompt not in self._warm and cost < _WARM_UP_SHARE * limit:
            for way in ("off", "on"):
                self._generate(planned, way, self._new_tokens, self.deadline)
        self._warm.add(planned.prompt)

    def _generate(
        self,
        planned: PlannedCase,
        speculate: Any,
        max_new_tokens: int,
        deadline: float,
        rounds: list[int] | None = None,
    ) -> GenerationResult | None:
        """Decode until the deadline; None where it passes before the first token.

        ``rounds`` is filled with how many tokens each round gave, if they speculated.
        """
        stream = self.session.stream(
            list(planned.token_ids),
            max_new_tokens=max_new_tokens,
            ignore_eos=self.capabilities.ignores_eos,
            speculate=speculate,
            **self.evidence,
            **planned.sampling,
        )
        for chunk in stream:
            if rounds is not None and speculate == "on":
                rounds.append(len(chunk.token_ids or ()))
            if time.monotonic() >= deadline:
                stream.cancel()
        result = stream.result
        if result is None:
            raise EngineError("The session ended a stream without a result.", "Tell the plugin's author.")
        seconds = result.stats.prefill_seconds or 0.0
        # The worst rate, slowly forgotten: one slow prefill must not exclude long prompts for good.
        self._prefill_rate = max(self._prefill_rate * 0.9, seconds / len(planned.token_ids))
        return result if result.raw_text or result.token_ids else None
