"""The session over a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polydraft._session import Session
from polydraft.contract import Round
from polydraft.errors import EngineError, UnsupportedError

from polydraft_vllm.server.request import Piece, ServerRequest
from polydraft_vllm.server.statistics import CounterReading, from_response
from polydraft_vllm.settings import PLAIN_FLAG, check_temperature, seed_of

if TYPE_CHECKING:
    from polydraft._session import Generation
    from polydraft.contract import Capabilities, GenerationSettings, GenerationStats, RunningInfo, Tokenizer

    from polydraft_vllm.server.client import ServerClient
    from polydraft_vllm.server.inspection import Abilities
    from polydraft_vllm.server.process import ServerProcess

__all__ = ["VllmServerSession", "completion_arguments"]

_WAIT = 0.1
"""Seconds after which a waiting reader looks whether its call was cancelled."""


class VllmServerSession(Session):
    """See ``Session``. Text, stop strings and chat are the core's: the server is sent and asked for token ids.

    Args:
        client: The server's; closed with the session.
        process: The server itself, if it is this session's own: stopped with the session.
        abilities: What the server was found to do.
        tokenizer: The target's.
        running: What really runs.
        capabilities: The backend's.
    """

    def __init__(
        self,
        client: ServerClient,
        process: ServerProcess | None,
        abilities: Abilities,
        tokenizer: Tokenizer,
        running: RunningInfo,
        capabilities: Capabilities,
    ) -> None:
        self.client = client
        self.process = process
        self.abilities = abilities
        super().__init__(tokenizer, running, capabilities)

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Send the request at once; a thread reads the answer whether or not the iterator is read."""
        request = generation.request
        plain = not request.speculate and bool(self.abilities.speculates)
        asked = generation.off is not None and generation.off.code == "caller"
        if plain and asked and not self.abilities.plain_requests:
            raise UnsupportedError(
                f"The vLLM server at {self.client.url} cannot decode a single request plainly.",
                "Start it with `polydraft serve`, or without a drafter.",
            )
        counted = self.abilities.speculates and not self.abilities.reports_requests and not plain
        before = CounterReading(self.client) if counted else None
        arguments = completion_arguments(generation, self.abilities.model, plain=plain)
        sent = ServerRequest(self.client, request.settings.logprobs, arguments)
        return _Rounds(self, generation, sent, before)

    def check_settings(self, settings: GenerationSettings) -> None:
        """What vLLM would change or refuse is refused before it is asked."""
        check_temperature(settings)
        super().check_settings(settings)

    def close_engine(self) -> None:
        """Hang up; stop the server if it is ours."""
        self.client.close()
        if self.process is not None:
            self.process.stop()
            self.process.discard_log()


class _Rounds(Iterator[Round]):
    """Rounds of one request. No generator: its ``close`` must free the request even if it was never read."""

    def __init__(
        self, session: VllmServerSession, generation: Generation, sent: ServerRequest, before: CounterReading | None
    ) -> None:
        self._session = session
        self._generation = generation
        self._sent = sent
        self._before = before
        self._timings: list[float] = []
        self._waiting: Round | None = None

    def __next__(self) -> Round:
        """The next round.

        The end's statistics come behind the last token: the last round waits for them, that the result may have them.
        """
        while not self._generation.cancelled.is_set():
            found = self._sent.next(_WAIT)
            if found is None:
                continue
            if isinstance(found, Piece):
                if self._waiting is None:
                    emitted = self._round(found)
                    if self._generation.tracker.finish_reason is None:
                        return emitted
                    self._waiting = emitted
                    if self._generation.tracker.finish_reason == "stop" and isinstance(
                        self._generation.tracker.stop_match, str
                    ):
                        break  # the server knows nothing of stop strings and would go on
                continue
            if self._waiting is None:
                raise EngineError(f"vLLM ended the request by itself ({found.finish_reason}).", "Look at its log.")
            self._report(None if found.speculation is None else from_response(found.speculation))
            break
        self.close()
        last, self._waiting = self._waiting, None
        if last is None:
            raise StopIteration
        return last

    def _round(self, piece: Piece) -> Round:
        tracker = self._generation.tracker
        kept = 0
        for token_id in piece.token_ids:
            kept += 1
            if tracker.push(token_id, is_draft=False) is not None:
                break
        self._timings.append(piece.seconds)
        abilities = self._session.abilities
        plain = abilities.speculates is False or (not self._generation.request.speculate and abilities.plain_requests)
        return Round(
            token_ids=piece.token_ids[:kept],
            # An event may hold several rounds: what was drafted in each is not known.
            num_draft_tokens=0 if plain else None,
            num_accepted_tokens=0 if plain else None,
            logprobs=None if piece.logprobs is None else piece.logprobs[:kept],
            seconds=piece.seconds,
        )

    def _report(self, reported: GenerationStats | None) -> None:
        if reported is None and self._before is not None:
            reported = CounterReading(self._session.client).since(self._before)
        if reported is None or not self._session.abilities.speculates:
            return
        self._generation.counts.reported = reported.model_copy(
            update={
                "num_tokens": len(self._generation.tracker.token_ids),
                "prefill_seconds": self._timings[0],
                "decode_seconds": sum(self._timings[1:]),
            }
        )

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._sent.cancel()


def completion_arguments(generation: Generation, model: str, *, plain: bool) -> dict[str, Any]:
    """The arguments of the client's ``completions.create``.

    Args:
        generation: The call.
        model: By the server's name.
        plain: Whether the server shall make no drafts for it.
    """
    request = generation.request
    settings = request.settings
    room = request.max_total_tokens - len(request.prompt_token_ids)
    extra: dict[str, Any] = {
        "return_token_ids": True,
        "top_k": settings.top_k,
        "repetition_penalty": settings.repetition_penalty,
        "min_tokens": min(settings.min_new_tokens, room),
        "ignore_eos": True,
        "stop_token_ids": sorted(request.eos_token_ids | set(settings.stop_token_ids)),
        "skip_special_tokens": False,
    }
    if plain:
        extra["vllm_xargs"] = {PLAIN_FLAG: 1}
    arguments: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_token_ids),
        "max_tokens": min(settings.max_new_tokens, room),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
    }
    if settings.temperature:
        arguments["seed"] = seed_of(request)
    if settings.logprobs is not None:
        arguments["logprobs"] = settings.logprobs
        extra["return_tokens_as_token_ids"] = True
    return {**arguments, "extra_body": extra}
