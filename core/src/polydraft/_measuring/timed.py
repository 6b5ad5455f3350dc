"""A loaded engine whose rounds are split into their parts, or whose drafts are accepted by chance.

It stands between the loop and a stepping engine; the loop and the engine are those that every session has. Before a
choice it waits for the logits, since libraries and devices compute them only when they are needed: so rounds that are
split are not those whose speed counts.
"""

from __future__ import annotations

from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any

from polydraft._measuring.bench import RoundSeconds
from polydraft.contract.stepping import EngineSequence, Proposal, Sampler, Step, SteppingEngine
from polydraft.sampling._soundness import UNSOUND
from polydraft.sampling.numpy_ops import array_ops_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polydraft.contract.arrays import ArrayOps

__all__ = ["TimedEngine"]


class _Clock:
    """Seconds of the parts of rounds, added up."""

    def __init__(self) -> None:
        self.draft = self.verify = self.choose = 0.0
        self.chosen = 0
        """How often a token was chosen from logits."""
        self.in_one_piece: tuple[float, float, float] | None = None
        """Where the time of rounds went that the engine runs in one piece, by its own account."""

    def timed_choice(self, choose: Callable[..., Any], ops: ArrayOps[Any]) -> Callable[..., Any]:
        """The sampler's method, timed from the moment when the logits are there."""

        def timed(logits: Any, *arguments: Any, **named: Any) -> Any:
            ops.tolist(ops.first_column(logits))  # the smallest thing to wait for
            started = perf_counter()
            try:
                return choose(logits, *arguments, **named)
            finally:
                self.choose += perf_counter() - started
                self.chosen += 1

        return timed


class TimedEngine(SteppingEngine):
    """A loaded engine, which stays usable next to this one. It is not closed by it.

    Args:
        engine: The engine.
        split: Whether to time the parts of rounds.
        by_host: Whether an engine that would choose tokens in its steps has the host choose them: its rounds can then
            be split.
        synthetic_acceptance: Chance from 0 to 1 that a draft is accepted if those before it are, whatever the target
            chooses: the output is then no text of the model. None: drafts are accepted by the rule.
    """

    def __init__(
        self, engine: SteppingEngine, *, split: bool, by_host: bool = False, synthetic_acceptance: float | None
    ) -> None:
        self.inner = engine
        self.tokenizer = engine.tokenizer
        self.running = engine.running
        self.array_ops = engine.array_ops
        self.max_sequences = engine.max_sequences
        self.clock = _Clock()
        self.split = split
        self.by_host = by_host
        self.chance = synthetic_acceptance
        self.random = Random(0)

    @property
    def max_draft_tokens(self) -> int:
        """The engine's."""
        return self.inner.max_draft_tokens

    def open_sequence(self) -> EngineSequence:
        """A sequence of the engine, timed; the clock starts at zero."""
        self.clock = _Clock()
        return _TimedSequence(self.inner.open_sequence(), self)

    def parts(self) -> RoundSeconds:
        """Where the time of the newest sequence went."""
        clock = self.clock
        if not clock.chosen:  # choices are part of the engine's steps
            whole = RoundSeconds(engine=clock.draft + clock.verify)
            if not clock.in_one_piece or not any(clock.in_one_piece):
                return whole
            draft, verify, choose = clock.in_one_piece
            return whole.in_shares_of(
                RoundSeconds(engine=draft + verify + choose, draft=draft, verify=verify, choose=choose)
            )
        engine = clock.draft + clock.verify + clock.choose
        return RoundSeconds(engine=engine, draft=clock.draft, verify=clock.verify, choose=clock.choose)

    def close(self) -> None:
        """The engine is closed by its own session."""


class _TimedSequence(EngineSequence):
    def __init__(self, inner: EngineSequence, engine: TimedEngine) -> None:
        self._inner = inner
        self._clock = engine.clock
        self._by_host = engine.by_host
        self._ops = array_ops_of(engine) if engine.split else None
        self._chance = engine.chance
        self._engine_draws = engine.chance is not None and inner.accept_by_chance(engine.chance)
        self._in_one_piece = False
        self._random = engine.random
        self._vocab_size = engine.tokenizer.vocab_size

    @property
    def length(self) -> int:
        return self._inner.length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        self._inner.cancelled = self.cancelled
        step = self._inner.prefill(token_ids, sampler, keep_logits=keep_logits)
        if self._ops is not None:
            # From now on. Methods of this one object, which engines know by its identity and its class.
            for name in ("choose", "choose_draft"):
                setattr(sampler, name, self._clock.timed_choice(getattr(sampler, name), self._ops))
            self._inner.part_seconds()  # from now on
            if self._by_host:
                setattr(sampler, "chooses_on_device", lambda _: False)  # noqa: B010 - of this one object
        return step

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        clock = self._clock
        started, chose = perf_counter(), clock.choose
        proposal = self._inner.propose(newest, k, sampler, keep_logits=keep_logits)
        clock.draft += perf_counter() - started - (clock.choose - chose)
        self._in_one_piece = proposal.verified
        return proposal

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        clock = self._clock
        started, chose = perf_counter(), clock.choose
        step = self._inner.verify(token_ids, sampler, keep_logits=keep_logits)
        clock.verify += perf_counter() - started - (clock.choose - chose)
        if self._ops is not None:
            clock.in_one_piece = self._inner.part_seconds()
        drawn, self._in_one_piece = self._engine_draws and self._in_one_piece, False
        return step if self._chance is None or drawn else self._by_chance(step, token_ids[1:], self._chance)

    def _by_chance(self, step: Step, drafts: Sequence[int], chance: float) -> Step:
        """The step with choices that accept each draft by chance."""
        chosen = list(step.token_ids)
        if UNSOUND in chosen:
            return step
        for at, draft in enumerate(drafts):
            if self._random.random() >= chance:
                if chosen[at] == draft:
                    chosen[at] = (draft + 1) % self._vocab_size
                break
            chosen[at] = draft
        return Step(chosen, step.logits, step.logprobs)

    def rollback(self, length: int) -> None:
        self._inner.rollback(length)

    def reusable(self, length: int) -> int:
        return self._inner.reusable(length)

    @property
    def held_bytes(self) -> int:
        return self._inner.held_bytes

    def park(self) -> None:
        self._inner.park()

    def close(self) -> None:
        self._inner.close()
