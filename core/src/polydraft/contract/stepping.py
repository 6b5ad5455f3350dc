"""The stepping engine: the second, smaller interface. Implement it, and the core runs the speculative loop.

Positions are absolute: token i of a sequence (prompt included, from 0) has position i. ``length`` counts the tokens
whose KV is stored. The *newest* token has been chosen but not yet run: it has position ``length``.

One round, as the core's loop drives it::

    drafts = sequence.propose(newest, k, sampler).token_ids          # d_1 .. d_k
    step = sequence.verify([newest, *drafts], sampler)               # k+1 rows, length grows by k+1
    accepted = number of leading drafts with d_i == step.token_ids[i-1]
    sequence.rollback(length_before + 1 + accepted)                  # step.token_ids[:accepted+1] are emitted
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from polydraft.contract.results import TokenLogprobs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from polydraft.contract.arrays import ArrayOps
    from polydraft.contract.results import RunningInfo
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["EngineSequence", "LogitsHandle", "PrefillCancelled", "Proposal", "Sampler", "Step", "SteppingEngine"]


class LogitsHandle(Protocol):
    """Logits of one step, still on the engine's device."""

    def numpy(self) -> npt.NDArray[np.float32]:
        """Copy to the host: float32, shape (rows, vocab)."""


@dataclass(frozen=True, slots=True)
class Step:
    """The target's choices of one forward: ``token_ids[i]`` follows the i-th token that was run.

    ``logits``: one row per token, the model's raw output (soft-cap applied); set only with ``keep_logits=True``.
    ``logprobs``: what ``Sampler.choose`` returned.
    """

    token_ids: list[int]
    logits: LogitsHandle | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A drafter's tokens: at most the k asked for, possibly fewer or none.

    ``logits``: the drafter's, one row per token; set only with ``keep_logits=True``.
    ``verified``: whether the target has run the tokens, too, as where a round is one launch. ``propose`` then takes the
    time of both, and a schedule of k counts all of it as the target's.
    """

    token_ids: list[int]
    logits: LogitsHandle | None = None
    verified: bool = False


class Sampler(Protocol):
    """Chooses tokens from logits, by the one rule of the core (``polydraft.sampling``). Engines only call it.

    The choice at a position depends on the logits there, the settings, the seed and the position, and on nothing else.
    """

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """The target's tokens for the positions ``first_position`` onwards, one per row.

        Args:
            logits: The engine's own array, shape (rows, vocab), any float dtype, on any device.
            first_position: Absolute position of the token that row 0 chooses: one past the token that row 0 ran.
            run_token_ids: The tokens that were run, one per row: row i's prefix, for penalties and processors, ends
                with the i-th.
            keep_logprobs: False leaves log-probabilities out even if the settings ask for them.

        Returns:
            One token id per row, and their log-probabilities; None if the settings ask for none. Of several rows, -1 in
            place of a token that cannot be chosen, because its row has NaN or +Inf, or no finite number; the engine
            returns it as it is, and the loop then runs the newest token alone.

        Raises:
            NonFiniteLogitsError: A single row is such a row; or the draft that is rejected was chosen from one.
        """

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """A drafter's token for one position, with the noise that the target's choice there uses.

        The choice stays on the device, so that a drafter can feed it back without waiting for the host.

        Args:
            logits: One row of the drafter's logits, shape (1, vocab), any float dtype, on any device.
            position: Absolute position of the drafted token; the first draft after the newest token has
                ``length + 1``.
            run_token_ids: The newest token and the earlier drafts of this round; required if ``needs_prefix``, else not
                read.

        Returns:
            The engine's own integer array of shape (1,).
        """

    @property
    def needs_prefix(self) -> bool:
        """Whether drafts depend on the tokens before them (penalties, processors), so need ``run_token_ids``."""


class PrefillCancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """Raised by ``EngineSequence.check_cancelled`` during the prefill of a cancelled call; the loop catches it."""


class EngineSequence(ABC):
    """One token sequence on an engine: the target's KV cache and the drafter's state."""

    cancelled: Callable[[], bool] | None = None
    """Returns whether the caller has cancelled. Set by the loop before ``prefill``."""

    def check_cancelled(self) -> None:
        """Call this between the chunks of a long prompt, so that cancelling need not wait for all of them.

        Raises:
            PrefillCancelled: The caller has cancelled; do not catch it.
        """
        if self.cancelled is not None and self.cancelled():
            raise PrefillCancelled

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of tokens whose KV is stored."""

    @abstractmethod
    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, in chunks if the engine prefers, and choose the token after it: a ``Step`` of one row.

        Called once, on an empty sequence, with at least one token; and again where ``reusable`` allows it: then
        ``token_ids`` are the rest of a prompt whose first ``length`` tokens are stored.

        Raises:
            OutOfMemoryError: The context does not fit.
            EngineError: The engine failed.
        """

    @abstractmethod
    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run ``token_ids`` (the newest token, then the drafts) after the stored ones; choose one token per row.

        Plain decoding is ``verify([newest], sampler)``. At most ``max_draft_tokens + 1`` tokens are given.
        """

    @abstractmethod
    def rollback(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, in every layer and in the drafter.

        Must restore the state exactly for up to ``max_draft_tokens + 1`` tokens after any verify, also past a sliding
        window. The row of token ``length - 1`` stays available to ``propose`` if the last prefill or verify ran it.
        """

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft up to k tokens after ``newest``, the token at position ``length``. The stored tokens do not change.

        An engine without a model drafter need not implement it: the core drafts n-grams itself.
        """
        return Proposal([])

    def reusable(self, length: int) -> int:
        """How many of the first ``length`` stored tokens a later prompt may reuse; 0, the default: none.

        Asked after a generation has ended, of a backend that claims ``reuses_prefixes``. The next call's prompt then
        continues this sequence: the loop calls ``rollback`` with the answer, and ``prefill`` with
        the rest of the prompt. What follows must be what an empty sequence gives, so the answer is 0 where a sliding
        layer has overwritten rows that the next token sees, or where NaN may be stored. ``rollback(0)`` must work
        then, too: it empties the sequence.

        With ``exactness="bitwise"`` the bits must be equal. ``length`` then counts only tokens that a prefill has run,
        and the answer is a length at which a prefill of an empty sequence would end a chunk.
        """
        return 0

    @property
    def held_bytes(self) -> int:
        """Memory that closing the sequence frees, which decides how many are kept; 0: it was allocated at load."""
        return 0

    def accept_by_chance(self, chance: float) -> bool:
        """For measurements: rounds that run in one piece (``Proposal.verified``) accept drafts by chance from now on.

        Args:
            chance: That a draft is accepted if those before it are, whatever the target chooses; where one is rejected,
                the choice is another token.

        Returns:
            Whether they do; False, the default: the caller sees to it, which spoils rounds that run ahead of it.
        """
        return False

    def part_seconds(self) -> tuple[float, float, float] | None:
        """For measurements: how long the rounds that run in one piece have drafted, verified, and chosen tokens.

        Of those since the first call, which begins; None, the default: there are none, or that is not known.
        """
        return None

    def park(self) -> None:  # noqa: B027 - the default keeps everything
        """Give back what only a running sequence needs: it is kept, and ``rollback`` or ``close`` comes next.

        Raises:
            OutOfMemoryError: What is to be kept has to be copied, and does not fit; the sequence is then closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the sequence's memory. May be called twice."""


class SteppingEngine(ABC):
    """A loaded target, with its drafter if it has one, on which the core runs the speculative loop."""

    tokenizer: Tokenizer
    """The target's tokenizer."""

    running: RunningInfo
    """Engine, pair, k, dtype, device and limits as loaded: ``RunningInfo.of`` makes it. With ``max_sequences`` 1,
    ``concurrency`` must be ``serial``."""

    array_ops: ArrayOps[Any] | None = None
    """Operations on the engine's arrays, to choose tokens where the logits are. None: its logits are numpy arrays."""

    max_sequences: int | None = None
    """How many sequences may be open at a time; None: limited by memory only."""

    shared_sequences: int = 1
    """How many sequences run in one forward if as many threads step one each: ``generate_many`` then uses that many
    threads. 1: each has forwards of its own."""

    @property
    @abstractmethod
    def max_draft_tokens(self) -> int:
        """k_max, a constant of the engine: ``verify`` takes at most k_max + 1 tokens."""

    @abstractmethod
    def open_sequence(self) -> EngineSequence:
        """A new, empty sequence. What other sequences do must not change its output."""

    @abstractmethod
    def close(self) -> None:
        """Free the models. May be called twice, but never while a sequence is open."""
