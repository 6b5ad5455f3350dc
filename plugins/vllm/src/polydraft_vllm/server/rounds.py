"""One generation on a server: the request's arguments, and the pieces of its answer as rounds."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polydraft.contract import Round
from polydraft.errors import EngineError, NonFiniteLogitsError

from polydraft_vllm.server.client import EndedByErrorError
from polydraft_vllm.server.request import Piece, ServerRequest
from polydraft_vllm.server.statistics import CounterReading, from_response
from polydraft_vllm.settings import PLAIN_FLAG, sampling_values

if TYPE_CHECKING:
    from polydraft.contract import Generation, GenerationStats, TokenRequest

    from polydraft_vllm.server.client import ServerClient
    from polydraft_vllm.server.inspection import Abilities

__all__ = ["Rounds", "completion_arguments"]


class Rounds(Iterator[Round]):
    """The rounds of one request. Not a generator: ``close`` must free the request even if no round was read.

    ``before`` are the server's counters before the request, if its statistics have to come from them.
    """

    def __init__(
        self,
        client: ServerClient,
        abilities: Abilities,
        generation: Generation,
        sent: ServerRequest,
        before: CounterReading | None,
        dtype: str,
    ) -> None:
        self._client = client
        self._dtype = dtype
        self._abilities = abilities
        self._generation = generation
        self._sent = sent
        self._before = before
        self._timings: list[float] = []
        self._last: Round | None = None

    def __next__(self) -> Round:
        """The next round.

        The server sends statistics after the last token: the last round is held back until they have arrived, so that
        the result includes them.
        """
        generation = self._generation
        while not generation.cancelled():
            try:
                found = self._sent.next()
            except EndedByErrorError as error:
                if not self._abilities.plain_requests:  # not polydraft's scheduler
                    raise
                position = len(generation.request.prompt_token_ids) + len(generation.token_ids)
                raise NonFiniteLogitsError.at(None, position, self._dtype) from error
            if found is None:
                continue
            if not isinstance(found, Piece):
                if self._last is None:
                    raise EngineError(f"vLLM ended the request by itself ({found.finish_reason}).", "Look at its log.")
                if found.num_reused is not None:
                    generation.report_reused(found.num_reused)
                try:
                    self._report(None if found.speculation is None else from_response(found.speculation))
                except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
                    raise self._client.malformed(f"its statistics are not vLLM's ({type(error).__name__})") from error
                break
            if self._last is None:
                emitted = self._emit(found)
                if generation.finish_reason is None:
                    return emitted
                self._last = emitted
                if isinstance(generation.stop_match, str):
                    break  # the server does not know the stop string, and would go on
        self.close()
        last, self._last = self._last, None
        if last is None:
            raise StopIteration
        return last

    def _emit(self, piece: Piece) -> Round:
        self._timings.append(piece.seconds)
        abilities = self._abilities
        off = self._generation.speculation_off is not None
        # A piece may hold several rounds: how many tokens were drafted in each is not known.
        counted = 0 if abilities.speculates is False or (off and abilities.plain_requests) else None
        return self._generation.emit(
            piece.token_ids,
            num_draft_tokens=counted,
            num_accepted_tokens=counted,
            logprobs=piece.logprobs,
            seconds=piece.seconds,
        )

    def _report(self, reported: GenerationStats | None) -> None:
        if reported is None and self._before is not None:
            reported = CounterReading(self._client).since(self._before)
        if reported is not None and self._abilities.speculates:
            timings = {"prefill_seconds": self._timings[0], "decode_seconds": sum(self._timings[1:])}
            self._generation.report(
                reported.model_copy(update={"num_tokens": len(self._generation.token_ids), **timings})
            )

    def close(self) -> None:
        """Close the connection."""
        self._sent.cancel()


def completion_arguments(request: TokenRequest, model: str, *, plain: bool, reuses: bool = True) -> dict[str, Any]:
    """The body of the request; ``plain`` asks for decoding without drafts, ``reuses`` allows the prefix cache."""
    common, further = sampling_values(request)
    body = {**common, **further, "model": model, "prompt": list(request.prompt_token_ids)}
    body |= {"return_token_ids": True, "skip_special_tokens": False}
    if plain:
        body["vllm_xargs"] = {PLAIN_FLAG: 1}
    if not reuses:
        body["cache_salt"] = secrets.token_hex(16)  # requests of different salts share nothing
    # By default tokens are named by their text, which several ids may share; ``token_id:7`` is unambiguous.
    if "logprobs" in common:
        body["return_tokens_as_token_ids"] = True
    return body
