"""One generation in process: the request as vLLM takes it, and its step outputs as rounds."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polydraft.contract import Round
from polydraft.errors import EngineError, NonFiniteLogitsError

from polydraft_vllm.settings import PLAIN_FLAG, sampling_values, token_logprobs

if TYPE_CHECKING:
    from polydraft.contract import Generation, TokenRequest

__all__ = ["NOT_FINITE", "Rounds", "StepOutput", "Ticket", "received", "sampling_params"]

# How late a cancellation is noticed while the engine is silent.
_WAIT = 0.1  # seconds
NOT_FINITE = "error"
"""The finish reason with which polydraft's scheduler ends a request whose logits are not finite."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The output of one engine step for one request."""

    token_ids: tuple[int, ...]
    num_draft_tokens: int
    num_sampled: int
    """Tokens that the verifier produced: the accepted drafts and the bonus token. vLLM may have cut ``token_ids``."""
    logprobs: Sequence[Any] | None
    """vLLM's: one dict per token, token id -> Logprob."""
    seconds: float
    """Since the request's previous output; for the first one, since it was submitted."""
    finish_reason: str | None
    """vLLM's: stop, length, abort, ...; None while the request runs."""
    num_reused: int | None = None
    """Tokens of the prompt whose KV was in the prefix cache."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A submitted request. The engine's thread puts its outputs into the queue."""

    id: str
    latest: float
    """Time of the latest output, or of the submission."""
    outputs: queue.SimpleQueue[StepOutput | BaseException] = field(default_factory=queue.SimpleQueue)
    internal_id: str = ""
    """The scheduler's name for the request."""
    finished: bool = False


def received(outputs: queue.SimpleQueue[Any]) -> Any:
    """The next output of a request; None if it has not come yet, so that the reader can see whether it was cancelled.

    Raises:
        BaseException: What made the request or the engine fail.
    """
    try:
        output = outputs.get(timeout=_WAIT)
    except queue.Empty:
        return None
    if isinstance(output, BaseException):
        raise output
    return output


class Rounds(Iterator[Round]):
    """The rounds of one request. Not a generator: ``close`` must ``abort`` the request even if no round was read."""

    def __init__(self, generation: Generation, ticket: Ticket, abort: Callable[[Ticket], None], dtype: str) -> None:
        self._generation = generation
        self._dtype = dtype
        self._ticket = ticket
        self._abort = abort
        self._ended = False

    def __next__(self) -> Round:
        while not self._ended and not self._generation.cancelled():
            output = received(self._ticket.outputs)
            if output is not None:
                return self._emit(output)
        self.close()
        raise StopIteration

    def _emit(self, output: StepOutput) -> Round:
        generation = self._generation
        if output.finish_reason == NOT_FINITE:
            self.close()
            position = len(generation.request.prompt_token_ids) + len(generation.token_ids)
            raise NonFiniteLogitsError.at(None, position, self._dtype)
        if output.num_reused is not None:
            generation.report_reused(output.num_reused)
        emitted = generation.emit(
            output.token_ids,
            num_draft_tokens=output.num_draft_tokens,
            # The last sampled token is the target's own: the bonus token, or what replaces the first rejected draft.
            num_accepted_tokens=output.num_sampled - 1 if output.num_draft_tokens else 0,
            logprobs=_logprobs(output, generation.request.settings.logprobs or 0),
            seconds=output.seconds,
        )
        if generation.finish_reason is not None:
            self.close()
        # By the core's rules the output has not ended, so vLLM aborted the request.
        elif output.finish_reason is not None:
            self.close()
            raise EngineError(f"vLLM ended the request by itself ({output.finish_reason}).", "Look at its log.")
        return emitted

    def close(self) -> None:
        """Drop the request."""
        if not self._ended:
            self._ended = True
            self._abort(self._ticket)


def sampling_params(request: TokenRequest) -> Any:
    """The request's ``SamplingParams``."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    common, further = sampling_values(request)
    if (structured := further.get("structured_outputs")) is not None:
        further["structured_outputs"] = StructuredOutputsParams(**structured)
    return SamplingParams(
        **common,
        **further,
        # The core detokenizes, and finds stop strings.
        detokenize=False,
        # Only the tokens of the step; the default repeats all tokens so far in every output.
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if request.speculate else {PLAIN_FLAG: True},
    )


def _logprobs(output: StepOutput, count: int) -> Any:
    if output.logprobs is None:
        return None
    return [
        token_logprobs(token_id, found[token_id].logprob, ((key, value.logprob) for key, value in found.items()), count)
        for token_id, found in zip(output.token_ids, output.logprobs, strict=False)
    ]
