"""One generation on llama.cpp's server: its request, and rounds read from its timings."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from polydraft.contract import Generation, Round, Tokenizer, TokenLogprobs
from polydraft.engine_parts.http_client import Patience
from polydraft.errors import EngineError, NonFiniteLogitsError, PolydraftError, UnsupportedError

from polydraft_gguf.serving.client import Client
from polydraft_gguf.serving.guided import gbnf_of

__all__ = ["Rounds", "check_finite"]

_REPEATED = 8
"""An output that ends with a token this many times, or consists of it, is looked at again."""
_WAIT = 0.05
"""Seconds after which a reader that waits for tokens sees whether it was cancelled."""


@dataclass
class _Answered:
    """Tokens that the server sent with the same time: those of one round."""

    token_ids: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per token if they were asked for."""
    received: float = 0.0
    """When the last of them came, a time of ``time.perf_counter``."""
    reused: int | None = None
    """Tokens of the prompt that the server did not run; None: it does not say."""
    last: bool = False
    """Whether the server ended its answer with them."""


class Rounds(Iterator[Round]):
    """The rounds of one generation. Where the server ends at an id that does not end the output here, it goes on.

    The request is sent at once, and read by a thread whether or not this iterator is read. Not a generator: ``close``
    must end the request even if no round was read.

    Args:
        client: Of the server.
        generation: The call.
        tokenizer: The target's.
        dtype: Of the weights, for errors.
        check_alive: Raises an ``EngineError`` that says more if the server has ended.

    Raises:
        EngineError: The server failed, cannot be reached, or did not end in time; or it ended an output that must match
            where the output goes on here.
        UnsupportedError: Log-probabilities were asked for, and a character of the output is spread over tokens.
        NonFiniteLogitsError: The output ends with one token over and over, and its logits (in ``dtype``) are the cause.
    """

    def __init__(
        self,
        client: Client,
        generation: Generation,
        tokenizer: Tokenizer,
        dtype: str,
        check_alive: Callable[[], None],
    ) -> None:
        self._client = client
        self._generation = generation
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._check_alive = check_alive
        self._patience = client.patience(generation.request.settings.max_new_tokens)
        self._latest = time.perf_counter()
        self._answer = self._ask()
        self._ended = False

    def _ask(self) -> _Answer:
        body = _request(self._generation)
        top = self._generation.request.settings.logprobs
        return _Answer(self._client, body, top, self._tokenizer, self._patience)

    def __next__(self) -> Round:
        generation = self._generation
        while not self._ended and not generation.cancelled():
            try:
                found = self._answer.next()
            except PolydraftError as error:
                self._ended = True
                if isinstance(error, EngineError):
                    self._check_alive()
                raise
            if isinstance(found, _Answered):
                return self._emit(found)
            if self._answer.over and generation.request.settings.guided is not None:
                self.close()
                raise EngineError(
                    "llama.cpp's server ended an output that must match at a token that does not end outputs here.",
                    "Name it in `stop_token_ids`.",
                )
            if self._answer.over:
                self._answer = self._ask()
        self.close()
        raise StopIteration

    def _emit(self, found: _Answered) -> Round:
        generation, accepted = self._generation, found.accepted
        if found.last and accepted == len(found.token_ids) and self._goes_on(found.token_ids):
            # The server ended its answer at an accepted draft, and dropped the bonus token: this one takes its place.
            accepted -= 1
        if found.reused is not None and not generation.token_ids:
            generation.report_reused(found.reused)
        emitted = generation.emit(
            found.token_ids,
            num_draft_tokens=found.drafted,
            num_accepted_tokens=accepted,
            logprobs=found.logprobs or None,
            seconds=found.received - self._latest,
        )
        self._latest = found.received
        if generation.finish_reason is not None:
            self.close()
            _check_repetition(self._client, generation, self._dtype)
        return emitted

    def _goes_on(self, token_ids: Sequence[int]) -> bool:
        """Whether the output goes on after these tokens of it."""
        settings, ends = self._generation.request.settings, {*self._generation.request.settings.stop_token_ids}
        if not settings.ignore_eos:
            ends |= self._tokenizer.eos_token_ids
        longer = len(self._generation.token_ids) + len(token_ids) < settings.max_new_tokens
        return longer and ends.isdisjoint(token_ids)

    def close(self) -> None:
        """End the request, and wait until it has ended. May be called twice."""
        self._ended = True
        self._answer.close()


class _Answer:
    """One request to the server, read by a thread of its own."""

    def __init__(
        self, client: Client, body: dict[str, Any], top: int | None, tokenizer: Tokenizer, patience: Patience
    ) -> None:
        self._closed = threading.Event()
        self._found: queue.SimpleQueue[_Answered | BaseException | None] = queue.SimpleQueue()
        self.over = False
        """Whether all of it has been read."""
        answers = _answers(client, body, top, self._closed.is_set, patience, tokenizer)
        self._thread = threading.Thread(target=self._read, args=(answers,), name="polydraft-answer", daemon=True)
        self._thread.start()

    def _read(self, answers: Generator[_Answered]) -> None:
        try:
            with closing(answers):
                for answered in answers:
                    self._found.put(answered)
            self._found.put(None)
        except BaseException as error:  # raised again where the answer is read
            self._found.put(error)

    def next(self) -> _Answered | None:
        """The next tokens; None if none have come yet, or if the answer is ``over``.

        Raises:
            BaseException: What ended the request.
        """
        try:
            found = self._found.get(timeout=_WAIT)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        self.over = found is None
        return found

    def close(self) -> None:
        """Close the connection, upon which the server gives up the request."""
        self._closed.set()
        self._thread.join()


def check_finite(client: Client, body: dict[str, Any], position: int, dtype: str) -> dict[str, Any]:
    """Ask for a completion with the log-probabilities of its tokens; return the answer.

    Log-probabilities cost the server a pass over the vocabulary for each token, so ordinary requests ask for none.

    Args:
        client: Of the server.
        body: A short completion's, greedy.
        position: Absolute position of its first token.
        dtype: Of the weights, for the error.

    Raises:
        NonFiniteLogitsError: One is not a number: the server writes null.
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


def _answers(
    client: Client,
    body: dict[str, Any],
    top: int | None,
    cancelled: Callable[[], bool],
    patience: Patience,
    tokenizer: Tokenizer,
) -> Generator[_Answered]:
    """The rounds of one request to the server, with ``top`` candidates' log-probabilities unless that is None."""
    got, predicted, vocab_size = 0, None, tokenizer.vocab_size
    now, clock, drafted, accepted = _Answered(), None, 0, 0
    with closing(client.complete(body, cancelled, patience)) as completion:
        for event in completion:
            if event.get("stop"):
                predicted = event.get("tokens_predicted")
            if not event.get("tokens"):
                continue
            token_ids, logprobs = _whole(client, body, event, got, top, tokenizer)
            got += len(token_ids)
            if got > body["n_predict"]:
                raise client.malformed(f"it goes on after the {body['n_predict']} tokens that were asked for")
            timings = event.get("timings") or {}
            try:
                time_of_round = timings.get("predicted_ms")
                total, total_accepted = int(timings.get("draft_n", 0)), int(timings.get("draft_n_accepted", 0))
                reused = None if timings.get("cache_n") is None else int(timings["cache_n"])
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
            drafted, accepted, now.reused = total, total_accepted, reused
            now.received = time.perf_counter()
            now.token_ids.extend(token_ids)
            now.logprobs.extend(logprobs)
        if isinstance(predicted, int) and got < predicted and not cancelled():
            # A stream that ends inside a character lacks its tokens; the same answer in one piece has them.
            answer = client.json("/completion", body, seconds=client.limits.read_timeout)
            missing = client.token_ids(answer.get("tokens"), vocab_size)[got:]
            if top is not None:
                raise _without_logprobs()
            now.token_ids.extend(missing)
            now.received, got = time.perf_counter(), got + len(missing)
        if now.token_ids:
            now.last = True
            yield now
    if not got and not cancelled():
        raise EngineError(f"{client.name} gave an answer without tokens.", "Use a newer version of llama.cpp.")


def _whole(
    client: Client, body: dict[str, Any], event: dict[str, Any], got: int, top: int | None, tokenizer: Tokenizer
) -> tuple[Sequence[int], list[TokenLogprobs]]:
    """The tokens of an event after ``got`` others, and their log-probabilities unless ``top`` is None.

    Of a character that is spread over several tokens, an event has the text and the last token only.

    Raises:
        EngineError: Log-probabilities are asked for: the server has none for the other tokens.
    """
    token_ids = client.token_ids(event["tokens"], tokenizer.vocab_size)
    count = event.get("tokens_predicted")
    lost = count - got - len(token_ids) if isinstance(count, int) else 0
    if lost <= 0:
        return token_ids, [] if top is None else _logprobs(client, event, token_ids, top)
    end = b"".join(map(tokenizer.token_bytes, token_ids))
    start = str(event.get("content", "")).encode().removesuffix(end)
    found = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in start]
    if top is not None:
        raise _without_logprobs()
    if len(found) == lost and None not in found:
        return [*(one for one in found if one is not None), *token_ids], []
    # In the same answer in one piece nothing is left out.
    answer = client.json("/completion", {**body, "n_predict": count}, seconds=client.limits.read_timeout)
    return client.token_ids(answer.get("tokens"), tokenizer.vocab_size)[got:], []


def _without_logprobs() -> UnsupportedError:
    return UnsupportedError(
        "llama.cpp's server gives no log-probabilities for a character that is spread over several tokens.",
        "Leave out `logprobs`, or use the backend llama_cpp.",
    )


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
        # The complete chain, in the order of ``GenerationSettings``; biases come before it. The server's default has
        # further samplers, such as XTC, and the temperature comes last there, so that other tokens would be left.
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p", "typ_p"],
        "repeat_penalty": settings.repetition_penalty,
        "repeat_last_n": request.max_total_tokens,  # the whole text; the default is 64 tokens
        "logit_bias": [
            *([token_id, bias] for token_id, bias in settings.logit_bias.items()),
            *([token_id, False] for token_id in settings.banned_token_ids),
        ],
        "n_probs": 0 if settings.logprobs is None else max(1, settings.logprobs),
        # 32 bits, without the largest, which means "draw one". Each continuation has another seed.
        "seed": (request.seed + 0x9E3779B1 * (request.stream + len(emitted))) % 0xFFFFFFFF,
        "return_tokens": True,
        "timings_per_token": True,
        # A first request runs its whole prompt: with what its slot held, the suite found other outputs after cancelled
        # and concurrent requests. A continuation reuses its prefix.
        "cache_prompt": bool(emitted),
        **({} if settings.guided is None else {"grammar": gbnf_of(settings.guided)}),
    }


def _logprobs(client: Client, event: dict[str, Any], token_ids: tuple[int, ...], top: int) -> list[TokenLogprobs]:
    """The log-probabilities of an event's tokens, from the target's raw logits."""
    try:
        found = [
            TokenLogprobs(token_id=entry["id"], logprob=entry["logprob"], top=_best(entry["top_logprobs"], top))
            for entry in event["completion_probabilities"]
        ]
        if [one.token_id for one in found] == [*token_ids]:
            return found
    except (ValueError, TypeError, LookupError):
        pass
    raise client.malformed("its log-probabilities are not those of its tokens")


def _best(found: list[dict[str, Any]], count: int) -> tuple[tuple[int, float], ...]:
    """The best ``count`` of them, equal ones in the order of their ids."""
    return tuple(sorted(((one["id"], one["logprob"]) for one in found), key=lambda one: (-one[1], one[0]))[:count])
