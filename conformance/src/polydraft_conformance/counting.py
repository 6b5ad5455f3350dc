"""Counts taken independently: what the loop really asked of a stepping engine, and what the engine answered."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polydraft.contract import EngineSequence, Proposal, Sampler, Step, SteppingEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polydraft import Session

__all__ = ["Counts", "SequenceLog", "WrappedSequence", "count_log", "logged", "stepping_engine", "wrapped_sequences"]


@dataclass(slots=True)
class SequenceLog:
    """What one sequence of the engine was asked for."""

    prompt: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    """The token that prefill chose."""
    proposals: list[tuple[int, list[int]]] = field(default_factory=list)
    """(k asked for, tokens proposed), by the engine's own drafter."""
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """(tokens run, tokens chosen)."""
    rollbacks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Counts:
    """What a generation's statistics should say."""

    steps: int
    rounds: int
    drafted: int
    accepted: int
    per_position: tuple[int, ...]
    """Element i: rounds in which draft i was accepted."""
    longest: int
    """The most drafts in one round."""
    emitted: int
    """Tokens that the steps chose, cut to the output."""


class WrappedSequence(EngineSequence):
    """An engine's sequence in a wrapper that passes everything on. Subclasses look, or change the drafts."""

    def __init__(self, inner: EngineSequence) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def length(self) -> int:
        """See ``EngineSequence.length``."""
        return self.inner.length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """See ``EngineSequence.prefill``."""
        return self.inner.prefill(token_ids, sampler, keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """See ``EngineSequence.verify``."""
        return self.inner.verify(token_ids, sampler, keep_logits=keep_logits)

    def rollback(self, length: int) -> None:
        """See ``EngineSequence.rollback``."""
        self.inner.rollback(length)

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """See ``EngineSequence.propose``."""
        return self.inner.propose(newest, k, sampler, keep_logits=keep_logits)

    def close(self) -> None:
        """See ``EngineSequence.close``."""
        self.inner.close()


class _LoggedSequence(WrappedSequence):
    """Writes down what it passes on."""

    def __init__(self, inner: EngineSequence, log: SequenceLog) -> None:
        super().__init__(inner)
        self.log = log

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        step = super().prefill(token_ids, sampler, keep_logits=keep_logits)
        self.log.prompt, self.log.first = list(token_ids), list(step.token_ids)
        return step

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        step = super().verify(token_ids, sampler, keep_logits=keep_logits)
        self.log.steps.append((list(token_ids), list(step.token_ids)))
        return step

    def rollback(self, length: int) -> None:
        super().rollback(length)
        self.log.rollbacks.append(length)

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        proposal = super().propose(newest, k, sampler, keep_logits=keep_logits)
        self.log.proposals.append((k, list(proposal.token_ids)))
        return proposal


def stepping_engine(session: Session) -> SteppingEngine | None:
    """The engine of a session whose loop is the core's; None for a whole engine."""
    return session.engine if isinstance(session.engine, SteppingEngine) else None


@contextmanager
def wrapped_sequences(engine: SteppingEngine, wrap: Callable[[EngineSequence], EngineSequence]) -> Iterator[None]:
    """Inside the ``with`` block, every sequence that the engine opens is put into a wrapper."""
    original = engine.open_sequence
    outer = vars(engine).get("open_sequence")  # of a wrapper around this one
    engine.open_sequence = lambda: wrap(original())  # type: ignore[method-assign]
    try:
        yield
    finally:
        if outer is None:
            del engine.open_sequence  # the instance's attribute: the class's method shows again
        else:
            engine.open_sequence = outer  # type: ignore[method-assign]


@contextmanager
def logged(session: Session) -> Iterator[list[SequenceLog] | None]:
    """The logs of all sequences opened inside the ``with`` block; None for a whole engine."""
    engine = stepping_engine(session)
    if engine is None:
        yield None
        return
    logs: list[SequenceLog] = []

    def wrap(inner: EngineSequence) -> EngineSequence:
        logs.append(SequenceLog())
        return _LoggedSequence(inner, logs[-1])

    with wrapped_sequences(engine, wrap):
        yield logs


def count_log(log: SequenceLog, num_tokens: int) -> Counts:
    """Count a log, cut to the ``num_tokens`` tokens that came out: accepted drafts beyond them do not count."""
    left = num_tokens - len(log.first)
    emitted = rounds = drafted = 0
    accepted = []
    for run, chosen in log.steps:
        drafts = run[1:]
        right = 0
        while right < len(drafts) and drafts[right] == chosen[right]:
            right += 1
        if drafts:
            rounds += 1
            drafted += len(drafts)
            accepted.append(min(right, max(left, 0)))
        came_out = min(right + 1, max(left, 0))
        emitted += came_out
        left -= came_out
    longest = max((len(run) - 1 for run, _ in log.steps), default=0)
    return Counts(
        steps=len(log.steps),
        rounds=rounds,
        drafted=drafted,
        accepted=sum(accepted),
        per_position=tuple(sum(count > position for count in accepted) for position in range(longest)),
        longest=longest,
        emitted=emitted,
    )
