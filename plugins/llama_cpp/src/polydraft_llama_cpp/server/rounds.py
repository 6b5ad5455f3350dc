"""Requests to a llama-server, and rounds read from its timings."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from polydraft.contract import Generation, Round
from polydraft.engine_parts.http_client import Patience
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


def rounds(client: Client, generation: Generation, vocab_size: int, dtype: str) -> Iterator[Round]:
    """Generate; where the server ends at an id that does not end the output here, ask it to continue.

    Raises:
        EngineError: The server failed, cannot be reached, or did not end in time.
        NonFiniteLogitsError: The output ends with one token over and over, and its logits (in ``dtype``) are the cause.
    """
    patience = client.patience(generation.request.settings.max_new_tokens)
    while not generation.cancelled():
        with closing(_answer(client, generation, vocab_size, patience)) as answers:
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
        EngineError: The server failed, or answers with JSON of another shape.
    """
    answer = client.json("/completion", {**body, "n_probs": 1}, seconds=client.limits.read_timeout)
    try:
        entries = [entry.get("logprob", 0.0) for entry in answer.get("completion_probabilities") or ()]
    except (AttributeError, TypeError):
        raise client.malformed("its log-probabilities are not a list of objects") from None
    if None in entries:
        raise NonFiniteLogitsError.at(None, position + entries.index(None), dtype)
    found: dict[str, Any] = answer
    return found


def _check_repetition(client: Client, generation: Generation, dtype: str) -> None:
    """Look at the logits of the last token if it comes out over and over, as it does where logits are not finite."""
    prompt, output = generation.request.prompt_token_ids, generation.token_ids
    if len(output) > 1 and len(set(output[-_REPEATED:])) == 1 and not generation.cancelled():
        prefix = [*prompt, *output[:-1]]
        body = {"prompt": prefix, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        check_finite(client, body, len(prefix), dtype)


def _answer(client: Client, generation: Generation, vocab_size: int, patience: Patience) -> Generator[_Answered]:
    """The rounds of one request to the server."""
    body = _request(generation)
    got = 0
    now, clock, drafted, accepted = _Answered(), None, 0, 0
    with closing(client.complete(body, generation.cancelled, patience)) as completion:
        for event in completion:
            if not event.get("tokens"):
                continue
            token_ids = client.token_ids(event["tokens"], vocab_size)
            got += len(token_ids)
            if got > body["n_predict"]:
                raise client.malformed(f"it goes on after the {body['n_predict']} tokens that were asked for")
            timings = event.get("timings") or {}
            try:
                time_of_round = timings.get("predicted_ms")
                total, total_accepted = int(timings.get("draft_n", 0)), int(timings.get("draft_n_accepted", 0))
            except (ValueError, TypeError, AttributeError, OverflowError):
                raise client.malformed("its timings are not numbers") from None
            if not 0 <= total_accepted - accepted <= total - drafted:
                raise client.malformed("it accepted more drafts than there were")
            if time_of_round != clock and now.token_ids:
                yield now
                now = _Answered()
            clock = time_of_round
            # The timings count from the start of the request.
            now.drafted += total - drafted
            now.accepted += total_accepted - accepted
            drafted, accepted = total, total_accepted
            now.token_ids.extend(token_ids)
        if now.token_ids:
            yield now
    if not got and not generation.cancelled():
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
