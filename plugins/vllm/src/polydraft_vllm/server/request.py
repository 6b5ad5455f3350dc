"""One request to a server. A thread reads its answer, so that callers can wait for a limited time, and cancel."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.errors import EngineError, PolydraftError

from polydraft_vllm.rounds import received
from polydraft_vllm.settings import token_logprobs

if TYPE_CHECKING:
    from polydraft.contract import TokenLogprobs

    from polydraft_vllm.server.client import ServerClient

__all__ = ["End", "Piece", "ServerRequest"]


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one event of the stream. A server may put several rounds into one."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    seconds: float
    """Since the previous piece; for the first one, since the request."""


@dataclass(frozen=True, slots=True)
class End:
    """The stream ended."""

    finish_reason: str | None
    speculation: Mapping[str, Any] | None
    """``metrics.speculative_decoding`` of the response."""
    num_reused: int | None
    """Tokens of the prompt whose KV was in the prefix cache; None: the server does not say."""


class ServerRequest:
    """A streamed completion.

    Args:
        client: Of the server.
        vocab_size: The target's number of token ids.
        body: The request: ``prompt``, ``max_tokens``, and ``logprobs`` if as many best tokens are wanted at each
            position.

    Raises:
        PolydraftError: The server refuses it.
    """

    def __init__(self, client: ServerClient, vocab_size: int, body: Mapping[str, Any]) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._max_tokens: int = body["max_tokens"]
        self._logprobs: int | None = body.get("logprobs")
        self._latest = time.perf_counter()
        self._pieces: queue.SimpleQueue[Piece | End | BaseException] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._answer = client.complete(body, cancelled=self._cancelled.is_set)
        self._thread = threading.Thread(target=self._run, name="polydraft-vllm-request", daemon=True)
        self._thread.start()

    def next(self) -> Piece | End | None:
        """The next piece; None if it has not come yet.

        Raises:
            PolydraftError: The stream failed.
        """
        piece: Piece | End | None = received(self._pieces)
        return piece

    def cancel(self) -> None:
        """Have the connection closed, upon which the server aborts the request. Returns at once."""
        self._cancelled.set()

    def _run(self) -> None:
        try:
            self._read()
        except PolydraftError as error:  # before ValueError: some are one
            self._pieces.put(error)
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # JSON of another shape
            self._pieces.put(self._client.malformed(f"{type(error).__name__}: {error}"))
        except Exception as error:
            self._pieces.put(error)

    def _read(self) -> None:
        count, reason, speculation, reused = 0, None, None, None
        with self._answer as events:
            for event in events:
                if (metrics := event.get("metrics")) is not None:
                    speculation = metrics.get("speculative_decoding")
                if (details := (event.get("usage") or {}).get("prompt_tokens_details")) is not None:
                    reused = details.get("cached_tokens")
                for choice in event["choices"]:
                    if choice.get("token_ids"):
                        count += self._put(choice, count)
                    if choice.get("finish_reason") is not None:
                        reason = str(choice["finish_reason"])
                        events.finishing()
        if self._cancelled.is_set():
            return
        if reason is None:
            raise EngineError(
                f"The answer of {self._client.name} broke off.", "The server may have died: look at its log."
            )
        self._pieces.put(End(reason, speculation, reused))

    def _put(self, choice: Mapping[str, Any], count: int) -> int:
        """Pass the tokens of one event on, after ``count`` others; returns how many they are."""
        token_ids = self._client.token_ids(choice["token_ids"], self._vocab_size)
        if count + len(token_ids) > self._max_tokens:
            raise self._client.malformed(f"it goes on after the {self._max_tokens} tokens that were asked for")
        now = time.perf_counter()
        logprobs = None if self._logprobs is None else _logprobs(choice, token_ids, self._logprobs)
        self._pieces.put(Piece(token_ids, logprobs, now - self._latest))
        self._latest = now
        return len(token_ids)


def _logprobs(choice: Mapping[str, Any], token_ids: tuple[int, ...], count: int) -> tuple[TokenLogprobs, ...]:
    """From OpenAI's lists, in which tokens are written ``token_id:7``."""
    found = choice["logprobs"]
    return tuple(
        token_logprobs(
            token_id,
            # JSON has null in place of NaN.
            math.nan if found["token_logprobs"][index] is None else found["token_logprobs"][index],
            (
                (int(name.rpartition(":")[2]), math.nan if value is None else value)
                for name, value in (found["top_logprobs"][index] or {}).items()
            ),
            count,
        )
        for index, token_id in enumerate(token_ids)
    )
