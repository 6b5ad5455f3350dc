"""Independent counts: what the loop asked of a stepping engine, and what the engine answered."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polydraft.contract import EngineSequence, GenerationStats, Proposal, Sampler, Step, SteppingEngine

from polydraft_conformance.primitives import logits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polydraft import Session
    from polydraft.verification import Logits

__all__ = [
    "RowRecorder",
    "SequenceLog",
    "WatchedRound",
    "WrappedSequence",
    "count_log",
    "logged",
    "stepping_engine",
    "wrapped_sequences",
]


@dataclass(frozen=True, slots=True)
class WatchedRound:
    """One round with its logits."""

    length: int
    """Tokens stored before it."""
    newest: int
    drafts: list[int]
    drafter: Logits | None
    """Shape (drafts, vocab); None: the engine's drafter gives no logits."""
    target: Logits | None
    """Shape (vocab,): of the token after the newest one."""


@dataclass(slots=True)
class SequenceLog:
    """The calls to one sequence of the engine, and their results."""

    prompt: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    """The token that prefill chose."""
    proposals: list[tuple[int, list[int]]] = field(default_factory=list)
    """(k asked for, tokens proposed), by the engine's own drafter."""
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """(tokens run, tokens chosen)."""
    rollbacks: list[int] = field(default_factory=list)
    watched: list[WatchedRound] = field(default_factory=list)
    """The rounds whose logits were asked for."""


class WrappedSequence(EngineSequence):
    """A wrapper that passes everything on. Subclasses observe, or change the drafts."""

    def __init__(self, inner: EngineSequence) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def length(self) -> int:
        """Number of stored tokens."""
        return self.inner.length

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt."""
        return self.inner.prefill(token_ids, sampler, keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts."""
        return self.inner.verify(token_ids, sampler, keep_logits=keep_logits)

    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.inner.rollback(length)

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft."""
        return self.inner.propose(newest, k, sampler, keep_logits=keep_logits)

    def close(self) -> None:
        """Free the wrapped sequence."""
        self.inner.close()


class _LoggedSequence(WrappedSequence):
    """Writes down what it passes on."""

    def __init__(self, inner: EngineSequence, log: SequenceLog, watch: Sequence[int] = ()) -> None:
        super().__init__(inner)
        self.log = log
        self.watch = sorted(watch)
        self.proposed: tuple[int, int, Proposal] | None = None
        """(length, newest token, proposal) of the round that is watched, until it is verified."""

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        step = super().prefill(token_ids, sampler, keep_logits=keep_logits)
        self.log.prompt, self.log.first = list(token_ids), list(step.token_ids)
        return step

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        watched, self.proposed = self.proposed, None
        step = super().verify(token_ids, sampler, keep_logits=keep_logits or watched is not None)
        self.log.steps.append((list(token_ids), list(step.token_ids)))
        if watched is not None:
            length, newest, proposal = watched
            drafter = proposal.logits.numpy() if proposal.logits is not None else None
            target = step.logits.numpy()[0] if step.logits is not None else None
            self.log.watched.append(WatchedRound(length, newest, list(proposal.token_ids), drafter, target))
        return step

    def rollback(self, length: int) -> None:
        super().rollback(length)
        self.log.rollbacks.append(length)

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        watches = bool(self.watch) and self.length >= self.watch[0]
        proposal = super().propose(newest, k, sampler, keep_logits=keep_logits or watches)
        self.log.proposals.append((k, list(proposal.token_ids)))
        if watches:
            self.watch = [length for length in self.watch if length > self.length]
            self.proposed = self.length, newest, proposal
        return proposal


class RowRecorder(WrappedSequence):
    """Asks for the logits of every step.

    Args:
        inner: The engine's sequence.
        keep: Is given the absolute position that a step's first row chooses for, and its rows, shape (rows, vocab).
    """

    def __init__(self, inner: EngineSequence, keep: Callable[[int, Logits], None]) -> None:
        super().__init__(inner)
        self.keep = keep

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, and keep its row."""
        step = super().prefill(token_ids, sampler, keep_logits=True)
        self.keep(len(token_ids), logits_of(step))
        return step

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run a step, and keep its rows."""
        first = self.length + 1
        step = super().verify(token_ids, sampler, keep_logits=True)
        self.keep(first, logits_of(step))
        return step


def stepping_engine(session: Session) -> SteppingEngine | None:
    """The engine of a session whose loop is the core's; None for a whole engine."""
    return session.engine if isinstance(session.engine, SteppingEngine) else None


@contextmanager
def wrapped_sequences(engine: SteppingEngine, wrap: Callable[[EngineSequence], EngineSequence]) -> Iterator[None]:
    """Inside the ``with`` block, every sequence that the engine opens is wrapped."""
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
def logged(session: Session, watch: Sequence[int] = ()) -> Iterator[list[SequenceLog] | None]:
    """The logs of all sequences opened inside the ``with`` block; None for a whole engine.

    Args:
        session: The session.
        watch: Numbers of stored tokens: of the first round at or after each, the logits are kept.
    """
    engine = stepping_engine(session)
    if engine is None:
        yield None
        return
    logs: list[SequenceLog] = []

    def wrap(inner: EngineSequence) -> EngineSequence:
        logs.append(SequenceLog())
        return _LoggedSequence(inner, logs[-1], watch)

    with wrapped_sequences(engine, wrap):
        yield logs


def count_log(log: SequenceLog, num_tokens: int) -> GenerationStats:
    """The expected statistics of a generation of ``num_tokens``; accepted drafts beyond its end do not count.

    ``accepted_per_position`` is as long as the longest draft.
    """
    # Tokens of the output that steps can still emit.
    left = num_tokens - len(log.first)
    drafted, accepted = [], []
    for run, chosen in log.steps:
        drafts = run[1:]
        right = 0
        while right < len(drafts) and drafts[right] == chosen[right]:
            right += 1
        if drafts:
            drafted.append(len(drafts))
            accepted.append(min(right, max(left, 0)))
        # A step emits the accepted drafts and one token of the target.
        left -= min(right + 1, max(left, 0))
    longest = max(drafted, default=0)
    return GenerationStats(
        num_tokens=num_tokens,
        num_target_steps=len(log.steps),
        num_drafts=len(drafted),
        num_draft_tokens=sum(drafted),
        num_accepted_tokens=sum(accepted),
        accepted_per_position=tuple(sum(count > position for count in accepted) for position in range(longest)),
    )
