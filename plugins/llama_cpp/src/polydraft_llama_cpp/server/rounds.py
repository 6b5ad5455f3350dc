"""Requests to a llama-server, and rounds read from its timings."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from polydraft.contract import Generation, Round
from polydraft.errors import EngineError, NonFiniteLogitsError

from polydraft_llama_cpp.server.client import Client

__all__ = ["check_finite", "rounds"]

_REPEATED = 8
"""An output that ends with a token this many times, or consists of it, is looked at again."""


@dataclass
class _Answered:
    """Tokens that the server sent with the same time: those of one round."""

    token_ids: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


def rounds(client: Client, generation: Generation, dtype: str) -> Iterator[Round]:
    """Generate; where the server ends at an id that does not end the output here, ask it to continue.

    Raises:
        EngineError: The server failed, or cannot be reached.
        NonFiniteLogitsError: The output ends with one token over and over, and its logits (in ``dtype``) are the cause.
    """
    while not generation.cancelled():
        with closing(_answer(client, generation)) as answers:
            for answered in answers:
                emitted = generation.emit(
                    answered.token_ids, num_draft_tokens=answered.drafted, num_accepted_tokens=answered.accepted
                )
                if generation.finish_reason is not None:
                    answers.close()  # the server does one request at a time
                    _check_repetition(client, generation, dtype)
                    yield emitted
                    return
                yield emitted


def check_finite(client: Client, body: dict[str, Any], position: int, dtype: str) -> dict[str, Any]:
    """Ask for a completion with the log-probabilities of its tokens; return the answer.

    Log-probabilities cost the server a pass over the vocabulary for each token, so ordinary requests ask for none.

    Args:
        client: Of the server.
        body: A short completion's, greedy.
        position: Absolute position of its first token.
        dtype: Of the weights, for the error.

    Raises:
        NonFiniteLogitsError: One is not a number: llama-server writes null.
    """
    answer: dict[str, Any] = client.request("/completion", {**body, "n_probs": 1})
    for index, entry in enumerate(answer.get("completion_probabilities") or ()):
        if entry.get("logprob", 0.0) is None:
            raise NonFiniteLogitsError.at(None, position + index, dtype)
    return answer


def _check_repetition(client: Client, generation: Generation, dtype: str) -> None:
    """Look at the logits of the last token if it comes out over and over, as it does where logits are not finite."""
    prompt, output = generation.request.prompt_token_ids, generation.token_ids
    if len(output) > 1 and len(set(output[-_REPEATED:])) == 1 and not generation.cancelled():
        prefix = [*prompt, *output[:-1]]
        body = {"prompt": prefix, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        check_finite(client, body, len(prefix), dtype)


def _answer(client: Client, generation: Generation) -> Generator[_Answered]:
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
        # The complete chain: llama-server's default has further samplers, such as penalties and XTC.
        "samplers": ["top_k", "top_p", "min_p", "temperature"],
        # 32 bits, without the largest, which means "draw one". Each continuation has another seed.
        "seed": (request.seed + 0x9E3779B1 * (request.stream + len(emitted))) % 0xFFFFFFFF,
        "return_tokens": True,
        "timings_per_token": True,
        # A first request runs its whole prompt, whatever the slot holds; a continuation reuses its prefix.
        "cache_prompt": bool(emitted),
    }
