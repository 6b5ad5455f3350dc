"""One request to a server. A thread reads its answer, so that callers can wait for a limited time, and cancel."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.errors import EngineError

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


class ServerRequest:
    """A streamed completion, with ``logprobs`` of that many best tokens at each position; None: without.

    Raises:
        PolydraftError: The server refuses it.
    """

    def __init__(self, client: ServerClient, logprobs: int | None, arguments: Mapping[str, Any]) -> None:
        self._client = client
        self._logprobs = logprobs
        self._submitted = time.perf_counter()
        self._pieces: queue.SimpleQueue[Piece | End | BaseException] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._answer = client.complete(**arguments)
        self._thread = threading.Thread(target=self._read, name="polydraft-vllm-request", daemon=True)
        self._thread.start()

    def next(self) -> Piece | End | None:
        """The next piece; None if it has not come yet.

        Raises:
            PolydraftError: The stream failed.
        """
        piece: Piece | End | None = received(self._pieces)
        return piece

    def cancel(self) -> None:
        """Close the connection, upon which the server aborts the request. Returns at once."""
        self._cancelled.set()

    def _read(self) -> None:
        latest = self._submitted
        reason, speculation = None, None
        try:
            with self._client.errors_while_reading(), self._answer as events:
                for event in events:
                    if self._cancelled.is_set():
                        return
                    if (metrics := (event.model_extra or {}).get("metrics")) is not None:
                        speculation = metrics.get("speculative_decoding")
                    for choice in event.choices:
                        token_ids = tuple((choice.model_extra or {}).get("token_ids") or ())
                        reason = choice.finish_reason or reason
                        if token_ids:
                            now = time.perf_counter()
                            logprobs = None if self._logprobs is None else _logprobs(choice, token_ids, self._logprobs)
                            self._pieces.put(Piece(token_ids, logprobs, now - latest))
                            latest = now
            if reason is None:
                raise EngineError(
                    f"The answer of the vLLM server at {self._client.url} broke off.",
                    "The server may have died: look at its log.",
                )
            self._pieces.put(End(reason, speculation))
        except Exception as error:
            self._pieces.put(error)


def _logprobs(choice: Any, token_ids: tuple[int, ...], count: int) -> tuple[TokenLogprobs, ...]:
    """From OpenAI's lists, in which tokens are written ``token_id:7``."""
    found = choice.logprobs
    return tuple(
        token_logprobs(
            token_id,
            # JSON has null in place of NaN.
            math.nan if found.token_logprobs[index] is None else found.token_logprobs[index],
            (
                (int(name.rpartition(":")[2]), math.nan if value is None else value)
                for name, value in (found.top_logprobs[index] or {}).items()
            ),
            count,
        )
        for index, token_id in enumerate(token_ids)
    )
