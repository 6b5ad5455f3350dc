"""Requests to a llama-server, and rounds read from its timings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from polydraft.contract import Generation, Round
from polydraft.errors import EngineError

from polydraft_llama_cpp.server.client import Client

__all__ = ["rounds"]


@dataclass
class _Answered:
    """Tokens that the server sent with the same time: those of one round."""

    token_ids: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


def rounds(client: Client, generation: Generation) -> Iterator[Round]:
    """Generate; where the server ends at an id that does not end the output here, ask it to continue.

    Raises:
        EngineError: The server failed, or cannot be reached.
    """
    while not generation.cancelled():
        for answered in _answer(client, generation):
            yield generation.emit(
                answered.token_ids, num_draft_tokens=answered.drafted, num_accepted_tokens=answered.accepted
            )
            if generation.finish_reason is not None:
                return


def _answer(client: Client, generation: Generation) -> Iterator[_Answered]:
    """The rounds of one request to the server."""
    got = False
    now, clock, drafted, accepted = _Answered(), None, 0, 0
    with closing(client.complete(_request(generation))) as completion:
        for event in completion:
            if generation.cancelled():
                return
            token_ids, timings = event.get("tokens"), event.get("timings") or {}
            if not token_ids:
                continue
            if timings.get("predicted_ms") != clock and now.token_ids:
                yield now
                now = _Answered()
            clock = timings.get("predicted_ms")
            # The timings count from the start of the request.
            now.drafted += int(timings.get("draft_n", 0)) - drafted
            now.accepted += int(timings.get("draft_n_accepted", 0)) - accepted
            drafted, accepted = int(timings.get("draft_n", 0)), int(timings.get("draft_n_accepted", 0))
            now.token_ids.extend(int(token_id) for token_id in token_ids)
            got = True
        if now.token_ids:
            yield now
    if not got:
        raise EngineError("llama-server gave an answer without tokens.", "Use a newer llama-server.")


def _request(generation: Generation) -> dict[str, Any]:
    """The body of a completion that continues the output so far."""
    request, emitted = generation.request, generation.token_ids
    settings, prompt = request.settings, [*request.prompt_token_ids, *emitted]
    return {
        "prompt": prompt,
        "n_predict": min(settings.max_new_tokens - len(emitted), request.max_total_tokens - len(prompt)),
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "typical_p": settings.typical_p,
        # The complete chain, in the order of ``GenerationSettings``: llama-server's default has further samplers, such
        # as penalties and XTC, and the temperature comes last there, so that other tokens would be left.
        "samplers": ["temperature", "top_k", "top_p", "min_p", "typ_p"],
        # 32 bits, without the largest, which means "draw one". Each continuation has another seed.
        "seed": (request.seed + 0x9E3779B1 * (request.stream + len(emitted))) % 0xFFFFFFFF,
        "return_tokens": True,
        "timings_per_token": True,
        # A first request runs its whole prompt, whatever the slot holds; a continuation reuses its prefix.
        "cache_prompt": bool(emitted),
    }
