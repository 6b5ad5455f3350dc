"""``WholeEngine``: an engine that keeps its own loop and sampler, and reports what each round emitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from polydraft.contract.requests import GenerationSettings, OffReason, TokenRequest
    from polydraft.contract.results import EndReason, FinishReason, GenerationStats, Round, RunningInfo, TokenLogprobs
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["Generation", "WholeEngine"]


class Generation(Protocol):
    """One call in progress, as an engine sees it. The core implements it."""

    @property
    def request(self) -> TokenRequest:
        """Prompt token ids, settings, seed, k and limits."""

    @property
    def speculation_off(self) -> OffReason | None:
        """Why this call does not speculate; None if it does."""

    def cancelled(self) -> bool:
        """Whether the caller has cancelled or closed the stream. Check between engine calls, then end the request."""

    def on_cancel(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called once the caller cancels, for an engine that waits and would not look at ``cancelled``.

        It is called by any thread, perhaps inside a signal handler: it may do no more than put something into a
        ``queue.SimpleQueue``. Called at once if the call has been cancelled already.
        """

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens emitted so far."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output has ended; None until then."""

    @property
    def stop_match(self) -> str | int | None:
        """The stop string or token id that ended the output; None if something else ended it, and until then."""

    def emit(
        self,
        token_ids: Sequence[int],
        *,
        num_draft_tokens: int | None,
        num_accepted_tokens: int | None,
        draft_token_ids: Sequence[int] | None = None,
        logprobs: Sequence[TokenLogprobs] | None = None,
        seconds: float | None = None,
        certain_ids: bool = True,
    ) -> Round:
        """Emit the tokens of one round, up to the token that ends the output. Yield the returned round before the next.

        ``finish_reason`` then says whether the output has ended. Tokens after its end are dropped, with their
        ``logprobs`` and their share of ``num_accepted_tokens``.

        Args:
            token_ids: Accepted drafts first, then the bonus token; at least one.
            num_draft_tokens: Tokens drafted in this round; 0 if there was no draft, None if not reported.
            num_accepted_tokens: How many leading ``token_ids`` are accepted drafts, at most ``num_draft_tokens``;
                None if not reported.
            draft_token_ids: The drafts, rejected ones included; None if not reported.
            logprobs: One entry per token; None unless the request asks for them.
            seconds: Time since the previous round (the first: since the request), for engines that generate ahead
                of the consumer. None: the core measures how long the consumer waits.
            certain_ids: False: the engine gave text, and ``token_ids`` are its tokenizer's for it. The user gets None
                in their place, unless ``confirm_ids`` follows.

        Raises:
            EngineError: The output has already ended, the round before was not yielded, or an argument is not what it
                should be.
        """

    def confirm_ids(self) -> None:
        """All ids emitted so far have turned out to be the engine's. Call it before the last round is yielded."""

    def report_reused(self, num_tokens: int) -> None:
        """Report how many of the prompt's tokens were not run, as an earlier call had left their KV.

        Called with what is known, at any time before the last round is yielded.
        """

    def report(self, stats: GenerationStats) -> None:
        """Use the engine's own statistics, not those counted from rounds. Call it before the last round is yielded.

        Emitted tokens are counted by the core all the same, except where the engine gives text alone
        (``polydraft.text.text_only``): then ``num_tokens`` is the engine's, and so is ``num_prompt_tokens``.
        """

    def finish(self, reason: EndReason) -> None:
        """The engine has ended the output. For engines that give text alone; the tokens of others show it.

        Call it after the last round was yielded, and return.

        Raises:
            EngineError: The engine gives tokens.
        """


class WholeEngine(ABC):
    """A loaded target, with its drafter if it has one, that runs its own loop. It may live in another process."""

    tokenizer: Tokenizer
    """The target's tokenizer."""

    running: RunningInfo
    """Engine, pair, k, dtype, device and limits as loaded: ``RunningInfo.of`` makes it."""

    picks_k: bool = False
    """Whether it takes k from each request, and picks it for each round where
    ``TokenRequest.least_speculative_tokens`` is set."""

    shared_sequences: int = 1
    """As ``SteppingEngine.shared_sequences``, of one in a worker. 1: an engine that runs all its calls by itself."""

    @abstractmethod
    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Generate: yield ``generation.emit(...)`` for each round (or each output of the engine).

        Return once ``generation.finish_reason`` is set or ``generation.cancelled()`` is true: an engine that waits
        (for another process, say) looks at it now and then. When the caller closes the stream, the iterator is closed
        (``GeneratorExit``): free the request then. The first round is that of the prefill.

        A concurrent engine may submit the request as soon as this is called, and return an iterator with a ``close``
        method: ``Session.generate_many`` calls this for all prompts before it reads the first round, so that they
        share the engine's batches. It then passes ``seconds`` to ``emit``.
        """

    def check_settings(self, settings: GenerationSettings) -> None:  # noqa: B027 - the default accepts all
        """Refuse values that the engine would alter or reject. Called before any work.

        Settings that the capabilities do not claim have already been refused. The default accepts all others. Any
        thread may call this, while another one generates; the same holds for ``speculation_conflict``.

        Raises:
            UnsupportedError: The engine does not support a value.
        """

    def speculation_conflict(self, settings: GenerationSettings) -> OffReason | None:
        """Why these settings cannot be combined with speculation on this engine; None if they can."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the engine. May be called twice, but never during a generation."""
