"""The session over an in-process engine: translates requests, reports rounds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polydraft._session import Session
from polydraft.contract import Round, TokenLogprobs
from polydraft.errors import EngineError, UnsupportedError

from polydraft_vllm.settings import PLAIN_FLAG, check_temperature, seed_of

if TYPE_CHECKING:
    from polydraft._session import Generation
    from polydraft.contract import Capabilities, GenerationSettings, RunningInfo, Tokenizer, TokenRequest

    from polydraft_vllm.engine import StepOutput, Ticket, VllmEngine

__all__ = ["VllmSession"]

_WAIT = 0.1
"""Seconds after which a waiting reader looks whether its call was cancelled."""


class VllmSession(Session):
    """See ``Session``. All calls share the engine's batches."""

    def __init__(
        self, engine: VllmEngine, tokenizer: Tokenizer, running: RunningInfo, capabilities: Capabilities
    ) -> None:
        self.engine = engine
        super().__init__(tokenizer, running, capabilities)

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Submit at once; the engine works whether or not the iterator is read."""
        from vllm.inputs import TokensPrompt

        request = generation.request
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
        return _Rounds(self.engine, generation, self.engine.submit(prompt, _sampling_params(request)))

    def check_settings(self, settings: GenerationSettings) -> None:
        """What vLLM would change or refuse is refused before it is asked."""
        check_temperature(settings)
        if settings.min_p and self.running.method is not None:
            raise UnsupportedError(
                "vLLM takes no min_p in an engine that speculates.", "Leave it out, or load with drafter=None."
            )
        super().check_settings(settings)

    def close_engine(self) -> None:
        """Free the engine."""
        self.engine.close()
        gc.collect()


class _Rounds(Iterator[Round]):
    """Rounds of one request. No generator: its ``close`` must free the request even if it was never read."""

    def __init__(self, engine: VllmEngine, generation: Generation, ticket: Ticket) -> None:
        self._engine = engine
        self._generation = generation
        self._ticket = ticket
        self._ended = False

    def __next__(self) -> Round:
        while not self._ended:
            if self._generation.cancelled.is_set():
                break
            output = self._ticket.next(_WAIT)
            if output is not None:
                return self._round(output)
        self.close()
        raise StopIteration

    def _round(self, output: StepOutput) -> Round:
        tracker = self._generation.tracker
        accepted = output.num_sampled - 1 if output.num_draft_tokens else 0
        kept = 0
        reason = None
        for index, token_id in enumerate(output.token_ids):
            reason = tracker.push(token_id, is_draft=index < accepted)
            kept += 1
            if reason is not None:
                break
        if reason is not None or output.finish_reason is not None:
            self.close()
            if reason is None:
                raise EngineError(f"vLLM ended the request by itself ({output.finish_reason}).", "Its log may say why.")
        return Round(
            token_ids=output.token_ids[:kept],
            num_draft_tokens=output.num_draft_tokens,
            num_accepted_tokens=min(accepted, kept),
            logprobs=None if output.logprobs is None else _logprobs(output, kept, self._generation.request),
            seconds=output.seconds,
        )

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.abort(self._ticket)


def _sampling_params(request: TokenRequest) -> Any:
    """The parameters. Stop strings are the core's: vLLM is told of ids only."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    settings = request.settings
    room = request.max_total_tokens - len(request.prompt_token_ids)
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        seed=seed_of(request) if settings.temperature else None,
        max_tokens=min(settings.max_new_tokens, room),
        min_tokens=min(settings.min_new_tokens, room),
        ignore_eos=True,  # its own list may be another than the one that counts here
        stop_token_ids=sorted(request.eos_token_ids | set(settings.stop_token_ids)),
        logprobs=settings.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if request.speculate else {PLAIN_FLAG: True},
    )


def _logprobs(output: StepOutput, kept: int, request: TokenRequest) -> tuple[TokenLogprobs, ...]:
    assert output.logprobs is not None
    count = request.settings.logprobs or 0
    entries = []
    for token_id, found in zip(output.token_ids[:kept], output.logprobs, strict=False):
        best = sorted(((key, value.logprob) for key, value in found.items()), key=lambda pair: (-pair[1], pair[0]))
        entries.append(TokenLogprobs(token_id=token_id, logprob=found[token_id].logprob, top=tuple(best[:count])))
    return tuple(entries)
