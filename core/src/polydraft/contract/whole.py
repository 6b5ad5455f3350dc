"""The whole engine: it keeps its own loop and sampler, and reports what each round emitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from polydraft.contract.requests import GenerationSettings, OffReason, TokenRequest
    from polydraft.contract.results import FinishReason, GenerationStats, Round, RunningInfo, TokenLogprobs
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["Generation", "WholeEngine"]


class Generation(Protocol):
    """One call in progress, as an engine sees it. The core implements it."""

    @property
    def request(self) -> TokenRequest:
        """The call in tokens."""
        ...

    @property
    def speculation_off(self) -> OffReason | None:
        """Why this call does not speculate; None if it does."""
        ...

    def cancelled(self) -> bool:
        """Whether the caller has cancelled or closed. Look at it between engine calls, and end the request then."""
        ...

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens emitted so far."""
        ...

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output has ended; None while it goes on."""
        ...

    @property
    def stop_match(self) -> str | int | None:
        """The stop string or token id that ended the output; None for any other ending, or before it."""
        ...

    def emit(
        self,
        token_ids: Sequence[int],
        *,
        num_draft_tokens: int | None,
        num_accepted_tokens: int | None,
        logprobs: Sequence[TokenLogprobs] | None = None,
        seconds: float | None = None,
    ) -> Round:
        """Emit the tokens of one round, up to the one that ends the output; the caller yields the result.

        Afterwards ``finish_reason`` says whether the output has ended. Tokens after its end are cut off, together with
        their ``logprobs`` and their share of ``num_accepted_tokens``.

        Args:
            token_ids: Accepted drafts first, then the bonus token; at least one.
            num_draft_tokens: Tokens drafted in this round; 0 if none were, None if the engine does not report it.
            num_accepted_tokens: How many leading ``token_ids`` are accepted drafts; None if not reported.
            logprobs: One entry per token; None if the request asks for none.
            seconds: Duration of this round; None: as long as the reader waits for it. See ``Round.seconds``.

        Raises:
            EngineError: The output has already ended.
        """
        ...

    def report(self, stats: GenerationStats) -> None:
        """Replace the statistics counted from rounds by the engine's own."""
        ...


class WholeEngine(ABC):
    """A loaded target, with its drafter if there is one, that generates by itself. It may live in another process."""

    tokenizer: Tokenizer
    """The target's tokenizer."""

    running: RunningInfo
    """What really runs."""

    @abstractmethod
    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Generate: yield ``generation.emit(...)`` for each round (or each output of the engine).

        Return once ``generation.finish_reason`` is set, or ``generation.cancelled()``. The iterator is closed
        (``GeneratorExit``) when the caller closes the stream: free the request then. The first round is the
        prefill's.

        A concurrent engine may submit the request as soon as this is called, and return an iterator with a ``close``
        method: ``Session.generate_many`` calls this for all prompts before it reads the first round, so that they
        share the engine's batches. Such rounds report their ``seconds``.
        """

    def check_settings(self, settings: GenerationSettings) -> None:  # noqa: B027 - accepting all is a fair default
        """Refuse values that the engine would change or not accept. Called before any work.

        Settings that the capabilities do not claim have been refused already. The default accepts the others.

        Raises:
            UnsupportedError: The engine does not support a value.
        """

    def speculation_conflict(self, settings: GenerationSettings) -> OffReason | None:
        """Why these settings cannot be combined with speculation on this engine; None if they can."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the engine. May be called twice; no generation is in progress then."""
